"""One part of `make gpu-check` in its own process, so that a crash or a hang ends this part alone.

    python -m benchmarks.gpu_part MODULE:FUNCTION ARGUMENTS SETTING OUT     # JSON, a file, a file

The function gets the setting and its arguments and returns rows, which are written to OUT. It raises `CannotRun` if a
device, a package or data is missing; any other exception is a failure. This file also holds the parts that need neither
DALI nor DeepSpeed.
"""

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

OWN_PACKAGES = ("benchmarks", "jobs", "model", "pipeline", "shards", "tests")
CROPS_PER_PHOTOGRAPH = 40


class CannotRun(Exception):
    """Something that a part needs is missing; the message is one line."""


@dataclass(frozen=True)
class Setting:
    """What all parts share; plain values, because it is passed as JSON."""

    device: str
    """`cuda`; `cpu` runs the same code as a test, but shows nothing about a GPU."""
    source: str
    """A packed dataset, or a folder of images; the demo's photographs if empty."""
    work: str
    """A folder for what the parts write."""
    seconds: float
    """Seconds to measure a rate."""
    images: int
    """Images that each form of decoding must decode."""
    recipes: dict[str, str]
    """Files of recipes, by model."""
    micro_batches: dict[str, int]
    """Images per micro-batch, by model."""
    compile: bool

    @property
    def packed(self) -> bool:
        return (Path(self.source) / "dataset.json").exists() if self.source else False

    @property
    def dataset(self) -> str:
        """The packed dataset that the parts read."""
        return self.source if self.packed else f"{self.work}/shards"


class Row(NamedTuple):
    """One claim or figure of a part."""

    what: str
    asked: str
    """The requirement; empty if the row only reports a figure."""
    found: str
    passed: bool
    figures: dict[str, Any]


def device(setting: Setting) -> list[Row]:
    """The device's name and driver, and a small matrix product."""
    import torch

    found = torch.device(setting.device)
    numbers = torch.arange(256.0).reshape(16, 16)
    right = torch.equal(
        (numbers.to(found) @ numbers.to(found)).cpu(), numbers @ numbers
    )  # integers, so the product is exact
    figures: dict[str, Any] = {"torch": torch.__version__}
    name = found.type
    if found.type == "cuda":
        properties = torch.cuda.get_device_properties(found)
        figures |= {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": list(torch.cuda.get_device_capability(found)),
            "cuda": torch.version.cuda,
            "driver": driver_version(),
        }
        name = f"{properties.name}, {properties.total_memory / 1e9:,.0f} GB, CUDA {torch.version.cuda}"
        name += f", driver {figures['driver']}" if figures["driver"] else ""
    return [Row("a small product", "as on the CPU", name, right, figures)]


def driver_version() -> str | None:
    """The version of NVIDIA's kernel module; None if it is not loaded."""
    with contextlib.suppress(OSError):
        if found := re.search(r"\s(\d+\.\d+(\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text()):
            return found[1]
    return None


def data(setting: Setting) -> list[Row]:
    """Packs the source, or the demo's photographs; a packed dataset is used as it is."""
    from maelstream.jobs.demo import write_crops
    from maelstream.shards.dataset import Dataset
    from maelstream.shards.errors import MaelstreamError
    from maelstream.shards.executors import Local
    from maelstream.shards.pack import pack
    from maelstream.shards.plan import PackOptions

    what = f"{setting.source}, packed" if setting.packed else setting.source or "the demo's photographs"
    if not setting.packed:
        images = Path(setting.source or f"{setting.work}/photographs")
        for earlier in (setting.dataset, f"{setting.work}/photographs"):
            shutil.rmtree(earlier, ignore_errors=True)
        try:
            if not setting.source:
                write_crops(images, CROPS_PER_PHOTOGRAPH, seed=0)
            workers = Local(len(os.sched_getaffinity(0)))
            pack(str(images), setting.dataset, PackOptions("gpu", "train", 2**26, 0), workers, lambda _: None)
        except MaelstreamError as error:
            raise CannotRun(str(error)) from None
    dataset = Dataset.open(setting.dataset)
    mean = [float(side[:].mean()) for side in (dataset.width, dataset.height)]
    found = f"{len(dataset):,} images of {what}, {mean[0]:.0f} x {mean[1]:.0f} px on average"
    return [Row("images", "", found, True, {"images": len(dataset), "width": mean[0], "height": mean[1]})]


def tests(setting: Setting, *files: str) -> list[Row]:
    """Runs the tests in `files` that are marked `gpu`."""
    for package in ("pytest", "hypothesis"):
        if importlib.util.find_spec(package) is None:
            raise CannotRun(f"no module {package}, which the tests need")
    report = Path(setting.work) / f"tests-{os.getpid()}.xml"
    # Verbose, so that the last line of a run that crashed or hung names the test.
    command = [sys.executable, "-X", "faulthandler", "-m", "pytest", *files, "-v", f"--junit-xml={report}"]
    marked = "gpu" if setting.device == "cuda" else "not gpu"
    plain = ["-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", "-m", marked]
    code = subprocess.run([*command, *plain]).returncode
    if code < 0:  # ends this process in the same way, so that the table names the signal
        os.kill(os.getpid(), -code)
    if code == 5:
        raise CannotRun(f"no test of {' '.join(files)} is marked {marked}")
    if code not in (0, 1):
        raise RuntimeError(f"pytest ended with {code}")
    row = row_of(ElementTree.parse(report), [Path(file).stem for file in files])
    report.unlink()
    return [row]


def row_of(report: "ElementTree.ElementTree[Any]", files: list[str]) -> Row:
    """The row for a JUnit report of pytest."""
    cases = list(report.iter("testcase"))
    failures = [
        (case.get("name"), fault) for case in cases for fault in (*case.findall("failure"), *case.findall("error"))
    ]
    skipped = [(case.get("name"), skip) for case in cases for skip in case.findall("skipped")]
    count = len(cases) - len(skipped)
    if not count:
        raise CannotRun(f"all {len(cases)} tests skipped: {skipped[0][1].get('message')}" if skipped else "no tests")
    found = f"{count - len(failures)} of {count} tests"
    found += f"; {len(skipped)} skipped: {skipped[0][1].get('message')}" if skipped else ""
    found += "".join(f"; {name}: {first_line(fault.get('message') or '')}" for name, fault in failures[:3])
    names = {"tests": count, "failed": [name for name, _ in failures], "skipped": [name for name, _ in skipped]}
    return Row(" ".join(files), "all pass", found, not failures, names)


def first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""


def last_words(log: str, code: int, ending: str) -> str:
    """Why a part ended: `ending`, or a signal and where it came in the Python code, or the last line of the log."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if not ending and code >= 0:
        return f"exit code {code}: {lines[-1] if lines else 'no output'}"
    ending = ending or f"killed by {signal.Signals(-code).name}"
    frame = re.search(r'Current thread.*\n\s+File "(.+?)", line (\d+) in (.+)', log)
    test = [line for line in lines if re.match(r"\S+\.py::", line)]
    if test and not re.search(r"(PASSED|SKIPPED|FAILED)", test[-1]):
        return f"{ending} in {test[-1].split()[0].rpartition('/')[2]}"
    return f"{ending} in {Path(frame[1]).name}, line {frame[2]}, {frame[3]}" if frame else ending


@contextlib.contextmanager
def missing_packages() -> Iterator[None]:
    """Raises CannotRun for a package that is not installed; a missing module of this project stays an error."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in OWN_PACKAGES:
            raise
        raise CannotRun(f"no module {error.name}; see docs/gpu.md for the wheels") from None


def rows_of(call: str, arguments: list[Any], setting: Setting) -> list[Row]:
    """Runs the part. Raises CannotRun as its function does, and if there is no CUDA device."""
    module, _, function = call.partition(":")
    with missing_packages():
        if setting.device == "cuda":
            import torch  # importing takes seconds

            if not torch.cuda.is_available():
                raise CannotRun("no CUDA device")
        return getattr(importlib.import_module(module), function)(setting, *arguments)


def main(call: str, arguments: str, setting: str, out: str) -> int:
    """Runs the part and writes OUT; returns 0 if OUT holds rows or the reason why the part could not run."""
    try:
        rows = rows_of(call, json.loads(arguments), Setting(**json.loads(Path(setting).read_text())))
        result: dict[str, Any] = {"rows": [row._asdict() for row in rows]}
    except CannotRun as error:
        result = {"cannot_run": first_line(str(error))}
    except Exception:
        traceback.print_exc()
        return 1
    Path(out).write_text(json.dumps(result))
    sys.stdout.flush()
    return 0


def write_setting(setting: Setting, path: Path) -> None:
    """Writes the setting to the file that `main` reads."""
    path.write_text(json.dumps(asdict(setting)))


if __name__ == "__main__":
    from benchmarks import gpu_part  # import it by the name under which the parts know CannotRun

    sys.exit(gpu_part.main(*sys.argv[1:]))
