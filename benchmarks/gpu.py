"""`make gpu-check`: checks what needs a GPU and prints one table; needs a CUDA GPU and no network (docs/gpu.md).

    python -m benchmarks.gpu --src IMAGES --out docs/measured/gpu-x.json

Each part is a process of its own with a time limit (benchmarks/gpu_part.py). If one crashes, hangs or lacks something,
the table gives the reason, and the other parts still run. The limits add up to less than `--seconds`. Exit code 0:
everything ran and passed; 1: something failed; 3: nothing failed, but something could not run.
"""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.gpu_part import Setting, first_line, last_words, write_setting
from benchmarks.run import PACKAGES, file_name, version_of
from maelstream.shards.durable import atomic_write

VERSION = 1
"""Version of the format of the JSON file."""
ROOT = Path(__file__).parents[1]
BUDGET_S = 540.0  # the sum of the limits below must not exceed it
FAILED, INCOMPLETE = 1, 3
DECODE, TRAIN, PART = "benchmarks.gpu_decode", "benchmarks.gpu_train", "benchmarks.gpu_part"
State = Literal["passed", "failed", "could not run", "reported"]
STYLES: dict[State, str] = {"passed": "green", "failed": "bold red", "could not run": "yellow", "reported": ""}


class Part(NamedTuple):
    """A check: a function of a module and its time limit."""

    name: str
    call: str
    limit_s: float
    arguments: tuple[str | int, ...] = ()
    needs: tuple[str, ...] = ("device",)
    """Parts that must have run before this one can."""


DATA = ("device", "data")
PARTS = (
    Part("device", f"{PART}:device", 20, needs=()),
    Part("data", f"{PART}:data", 25),
    Part("decode window", f"{DECODE}:form", 30, ("window",), DATA),
    Part("decode full", f"{DECODE}:form", 30, ("full",), DATA),
    Part("hostile samples", f"{PART}:tests", 35, ("tests/pipeline/test_decode.py", "tests/pipeline/test_loader.py")),
    Part("mask bits", f"{PART}:tests", 30, ("tests/model/test_masking.py",)),
    Part("golden vectors", f"{PART}:tests", 30, ("tests/model/test_parity.py", "tests/model/test_parity_f64.py")),
    Part("model", f"{PART}:tests", 20, ("tests/model/test_mae.py", "tests/model/test_transformer.py")),
    Part("compiled step", f"{PART}:tests", 30, ("tests/e2e/test_resume.py",)),
    Part("ZeRO", f"{TRAIN}:resume", 65, (), DATA),
    Part("loader", f"{DECODE}:loader", 30, (), DATA),
    Part("B/16", f"{TRAIN}:rates", 45, ("B/16",), DATA),
    Part("L/16", f"{TRAIN}:rates", 45, ("L/16",), DATA),
    Part("H/14", f"{TRAIN}:rates", 70, ("H/14",), DATA),
    Part("trace", f"{TRAIN}:trace", 35, (), DATA),
)
RECIPES = {"demo": "demo", "B/16": "vit_b16", "L/16": "vit_l16", "H/14": "vit_h14"}
MICRO_BATCHES = {"B/16": 512, "L/16": 256, "H/14": 128}  # 25, 20 and 30 GB by `maelstream plan`, with the model's state


@dataclass(frozen=True)
class Options:
    src: Path | None = None
    """A packed dataset or a folder of images. If not given, the demo's photographs, which are smaller than
    ImageNet's."""
    out: Path | None = None
    """The JSON file to write; docs/measured/gpu-<device>.json if not given."""
    work: Path = Path("runs/gpu")
    """A folder for shards, the output of the parts, and the trace."""
    seconds: float = BUDGET_S
    """Seconds for all parts; the limit of each part is in proportion."""
    parts: tuple[str, ...] = ()
    """Names of the parts to run, with those that they need; all if not given."""
    compile: bool = False
    """Compile the models: steps are faster, but compiling takes minutes, which `--seconds` must include."""


class Outcome(NamedTuple):
    """A row of the table."""

    part: str
    what: str
    asked: str
    found: str
    state: State
    figures: dict[str, Any]
    seconds: float
    """Seconds of the whole part."""


def outcomes_of(part: Part, setting_file: Path, folder: Path, limit_s: float) -> list[Outcome]:
    """Runs a part in its own process group and kills what is left of the group afterwards."""
    stem = re.sub(r"[^a-z0-9]+", "-", part.name.lower())
    result, log = folder / f"{stem}.json", folder / f"{stem}.log"
    result.unlink(missing_ok=True)
    arguments = [part.call, json.dumps(part.arguments), str(setting_file), str(result)]
    command = [sys.executable, "-X", "faulthandler", "-m", "benchmarks.gpu_part", *arguments]
    began, ending = time.monotonic(), ""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("wb") as file:
        environment = os.environ | {"PYTHONPATH": paths}
        child = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            child.wait(limit_s)
        except subprocess.TimeoutExpired:
            ending = f"not done after {limit_s:,.0f} s"
            with suppress(subprocess.TimeoutExpired):
                child.send_signal(signal.SIGABRT)  # faulthandler writes the stack to the log
                child.wait(1)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    seconds = time.monotonic() - began
    if not ending and child.returncode == 0 and result.exists():
        found = json.loads(result.read_text())
        if "cannot_run" in found:
            return [Outcome(part.name, "", "", found["cannot_run"], "could not run", {}, seconds)]
        return [
            Outcome(part.name, row["what"], row["asked"], row["found"], state_of(row), row["figures"], seconds)
            for row in found["rows"]
        ]
    reason = last_words(log.read_text(errors="replace"), child.returncode, ending)
    return [Outcome(part.name, "", "", reason, "failed", {"log": log.name}, seconds)]


def state_of(row: dict[str, Any]) -> State:
    """The state of a row of a part; a row without a requirement only reports a figure."""
    if not row["passed"]:
        return "failed"
    return "passed" if row["asked"] else "reported"


def chosen(names: tuple[str, ...], parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """The parts called `names` and those that they need, in the order of `parts`; exits with 2 for an unknown name."""
    known = {part.name: part for part in parts}
    for name in names:
        if name not in known:
            print(f"gpu-check: --parts: there is no {name!r}; one of {', '.join(known)}", file=sys.stderr)
            sys.exit(2)
    wanted = {need for name in names for need in (name, *known[name].needs)}
    return tuple(part for part in parts if not names or part.name in wanted)


def check(
    parts: tuple[Part, ...], setting: Setting, scale: float, note: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Runs the parts and returns all rows; calls `note` with the rows so far after each part.

    If a part cannot run, the parts that need it cannot run either, for the same reason.
    """
    folder = Path(setting.work) / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    write_setting(setting, folder / "setting.json")
    outcomes: list[Outcome] = []
    missing: dict[str, str] = {}
    for part in parts:
        why = next((missing[need] for need in part.needs if need in missing), None)
        if why is not None:
            outcomes.append(Outcome(part.name, "", "", why, "could not run", {}, 0.0))
        else:
            outcomes += outcomes_of(part, folder / "setting.json", folder, scale * part.limit_s)
        if outcomes[-1].state == "could not run":
            missing[part.name] = outcomes[-1].found
        note(outcomes)
    return outcomes


def exit_code(outcomes: list[Outcome]) -> int:
    """The exit code, as in the module's docstring."""
    states = {outcome.state for outcome in outcomes}
    return FAILED if "failed" in states else INCOMPLETE if "could not run" in states else 0


def table(outcomes: list[Outcome], title: str) -> Table:
    """One row per outcome."""
    result = Table("part", "", "required", "found", "", "s", title=title)
    shown = ""
    for row in outcomes:
        first = row.part != shown
        name, seconds = (row.part, f"{row.seconds:,.0f}") if first else ("", "")
        texts = map(escape, (row.what, row.asked, row.found))  # "[dev]" is not markup
        result.add_row(name, *texts, row.state, seconds, style=STYLES[row.state])
        shown = row.part
    return result


def document(outcomes: list[Outcome], device: str, seconds: float) -> dict[str, Any]:
    """The content of the JSON file."""
    names = dict.fromkeys((*PACKAGES, "nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12", "pytest"))
    versions = {name: version for name in names if (version := version_of(name))}
    return {
        "version": VERSION,
        "device": device,
        "python": platform.python_version(),
        "versions": versions,
        "seconds": seconds,
        "exit_code": exit_code(outcomes),
        "rows": [outcome._asdict() for outcome in outcomes],
    }


def main() -> int:
    """Prints the table and writes the JSON file; writes it after each part, so that no result is lost."""
    options = tyro.cli(Options, prog="python -m benchmarks.gpu", description=__doc__)
    if options.seconds <= 0:
        print(f"gpu-check: --seconds {options.seconds} must be more than 0", file=sys.stderr)
        return 2
    if options.src is not None and not options.src.is_dir():
        print(f"gpu-check: --src {options.src} is not a folder", file=sys.stderr)
        return 2
    scale, began = options.seconds / BUDGET_S, time.monotonic()
    setting = Setting(
        device="cuda",
        source="" if options.src is None else str(options.src.absolute()),
        work=str(options.work.absolute()),
        seconds=4 * scale,
        images=20_000,
        recipes={name: str(ROOT / "recipes" / "pretrain" / f"{stem}.yaml") for name, stem in RECIPES.items()},
        micro_batches=MICRO_BATCHES,
        compile=options.compile,
    )
    console = Console(width=None if sys.stdout.isatty() else 160)

    def note(outcomes: list[Outcome]) -> None:
        found = outcomes[0].figures.get("name")
        measured = ROOT / "docs" / "measured" / f"gpu-{Path(file_name(found or '')).stem}.json"
        out = options.out or (measured if found else options.work / "gpu.json")
        figures = document(outcomes, found or "no CUDA device", time.monotonic() - began)
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as file:
            file.write((json.dumps(figures, indent=1) + "\n").encode())
        last = outcomes[-1]
        console.print(f"{last.part}: {last.state}, {first_line(last.found)} -> {out}", style="dim", highlight=False)

    outcomes = check(chosen(options.parts, PARTS), setting, scale, note)
    title = f"{outcomes[0].figures.get('name', 'no CUDA device')}, {time.monotonic() - began:,.0f} s"
    console.print(table(outcomes, title))
    return exit_code(outcomes)


if __name__ == "__main__":
    sys.exit(main())
