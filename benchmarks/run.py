"""Every side-by-side timing in one command, `make bench`: loaders, step, pack and resume against the peers.

Each benchmark runs in its own process. Its output goes into one file, docs/measured/<device>.md, with versions and
commands. The file also names peers that are not installed and benchmarks that fail; the others still run.

    python -m benchmarks.run                 # about twenty minutes on two cores
    python -m benchmarks.run --quick         # a few minutes with fewer rounds, to check that everything runs
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro

Part = Literal["loaders", "step", "pack", "resume"]

PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "deepspeed", "timm", "simplejpeg")
PEERS = {"torchvision": "torchvision", "webdataset": "webdataset", "transformers": "transformers", "grain": "grain"}
PEERS |= {"spdl": "spdl", "ffcv": "ffcv"}
WHY_MISSING = {
    "ffcv": "its source on PyPI needs the headers of OpenCV and libjpeg-turbo to build, and no benchmark here runs it",
}


class Benchmark(NamedTuple):
    """A module of benchmarks/ and its arguments."""

    module: str
    arguments: tuple[str, ...]
    quick: tuple[str, ...]


def benchmarks(data: Path, threads: int) -> dict[Part, Benchmark]:
    """All benchmarks, on the images of `data`."""
    given = ("--data", str(data), "--threads", str(threads))
    return {
        "loaders": Benchmark("benchmarks.loaders", given, ("--rounds", "1", "--batches", "8")),
        "step": Benchmark(
            "benchmarks.step", ("--threads", str(threads)), ("--parts", "step", "--rounds", "1", "--batch", "4")
        ),
        "pack": Benchmark(
            "benchmarks.pack", (str(data), "--workers", str(threads)), ("--rounds", "1", "--repeat", "8")
        ),
        "resume": Benchmark("benchmarks.resume", given, ("--rounds", "1")),
    }


@dataclass(frozen=True)
class Options:
    data: Path = Path("../shared/imagenet-sample")
    """A folder of images, with one folder per class."""
    parts: tuple[Part, ...] = ("loaders", "step", "pack", "resume")
    threads: int = len(os.sched_getaffinity(0))
    out: Path | None = None
    """The Markdown file to write; docs/measured/<device>.md if not given."""
    json: Path | None = None
    """A folder for the figures of each benchmark, as JSON."""
    quick: bool = False


class Outcome(NamedTuple):
    """The result of one benchmark."""

    command: str
    printed: str
    failure: str
    """Why the benchmark failed; empty if it did not."""
    seconds: float


def device_name() -> str:
    """The GPU's name, or the CPU's name and its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{models[0] if models else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def file_name(device: str) -> str:
    """The file of a device's figures: `NVIDIA H100 80GB HBM3` -> `nvidia-h100-80gb-hbm3.md`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".md"


def outcome_of(module: str, arguments: tuple[str, ...]) -> Outcome:
    """Runs a benchmark, prints its output and returns it."""
    began = time.monotonic()
    command = [sys.executable, "-m", module, *arguments]
    # Wide enough for every table, so that no line in the docs is wrapped.
    done = subprocess.run(command, env=os.environ | {"COLUMNS": "110"}, capture_output=True, text=True)
    print(done.stdout, flush=True)
    errors = done.stderr.strip().splitlines()
    failure = f"exit code {done.returncode}: {errors[-1] if errors else 'no output'}" if done.returncode else ""
    return Outcome(" ".join(["python", "-m", module, *arguments]), done.stdout, failure, time.monotonic() - began)


def version_of(package: str) -> str | None:
    """The installed version; None if the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_peers() -> list[str]:
    """One line per peer that cannot be imported here."""
    missing = [name for name, module in PEERS.items() if importlib.util.find_spec(module) is None]
    return [f"{name}: not measured, {WHY_MISSING.get(name, 'not installed here')}" for name in missing]


def document(device: str, outcomes: dict[Part, Outcome], quick: bool) -> str:
    """The text of the Markdown file."""
    names = dict.fromkeys((*PACKAGES, *PEERS))
    versions = ", ".join(f"{name} {version}" for name in names if (version := version_of(name)))
    lines = [
        f"# Measured on {device}",
        "",
        f"`make bench{' ARGS=--quick' if quick else ''}` on Python {platform.python_version()}; {versions}.",
        "",
    ]
    if quick:
        lines += ["Few rounds, to check that everything runs; reliable ratios need the full run.", ""]
    lines += [*(f"* {line}" for line in missing_peers()), ""]
    for part, outcome in outcomes.items():
        lines += [f"## {part.capitalize()}", "", f"    {outcome.command}", ""]
        if outcome.printed.strip():
            lines += ["```", *(line.rstrip() for line in outcome.printed.strip().splitlines()), "```", ""]
        lines += [f"**Failed**, {outcome.failure}"] if outcome.failure else [f"({outcome.seconds:,.0f} s)"]
        lines += [""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def main() -> int:
    """Writes the file; returns 1 if a benchmark failed."""
    options = tyro.cli(Options, prog="python -m benchmarks.run", description=__doc__)
    device = device_name()
    outcomes: dict[Part, Outcome] = {}
    for part in options.parts:
        module, arguments, quick = benchmarks(options.data, options.threads)[part]
        if options.json is not None:
            options.json.mkdir(parents=True, exist_ok=True)
            arguments = (*arguments, "--json", str(options.json / f"{part}.json"))
        outcomes[part] = outcome_of(module, (*arguments, *quick) if options.quick else arguments)
        if outcomes[part].failure:
            print(f"{part}: {outcomes[part].failure}", file=sys.stderr)
    out = options.out or Path(__file__).parents[1] / "docs" / "measured" / file_name(device)
    out.write_text(document(device, outcomes, options.quick))
    print(f"written to {out}")
    return int(any(outcome.failure for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
