"""Random single-byte edits of every side file of a dataset and of a run, and what the commands then do.

    python -m benchmarks.side_files                          # 1,000 edits of each file, hours on 2 cores
    python -m benchmarks.side_files --edits 100 --files index.arrow

Side files are all files but the shards, the tensors and the copies of weights. After each edit of a dataset's file
`info`, `verify` and `loader` run, after each edit of a run's file `runs`, `watch` and `report`; after one edit in
`--resume-every` the run is resumed. A command passes if it ends within 60 s with an exit code of 128 or less and prints
no traceback. Edits are seeded: `--first N` repeats from edit N.
"""

import os
import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.faults import tiny_recipe
from tests.helpers.forked import run_ranks, start

TIMEOUT_S = 60
TENSORS = (".safetensors", ".tar", ".bin")


@dataclass(frozen=True)
class Options:
    """Edit every side file and run the commands that read it."""

    edits: int = 1000
    """Edits of each file."""
    first: int = 0
    """Number of the first edit."""
    resume_every: int = 20
    """Resume the run after one edit in this many."""
    files: tuple[str, ...] = ()
    """Names of the files to edit; all if not given."""


@dataclass
class Tried:
    """What the commands did after the edits of one file."""

    codes: Counter[str] = field(default_factory=Counter)
    """Number of runs by command and exit code."""
    failures: list[str] = field(default_factory=list)


def side_files(folder: Path) -> list[Path]:
    """The files below `folder` that are no shards and no tensors, and are not empty."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    return [path for path in files if path.suffix not in TENSORS and path.stat().st_size]


def edit(file: Path, rng: random.Random) -> str:
    """Changes one byte and says which."""
    data = bytearray(file.read_bytes())
    position = rng.randrange(len(data))
    before, data[position] = data[position], (data[position] + rng.randrange(1, 256)) % 256
    file.write_bytes(data)
    return f"byte {position} from {before} to {data[position]}"


def try_command(folder: Path, tried: Tried, where: str, command: str, *args: str) -> None:
    """Runs a command in a child process and records its exit code, or how it failed."""
    running = start(1, *args, output=folder / "output", command=command)
    (code,) = running.wait(TIMEOUT_S)
    tried.codes[f"{command} {code}"] += 1
    if not 0 <= code <= 128 or "Traceback" in running.printed:
        tried.failures.append(f"{where}: {command} ended with {code}: {running.printed.strip()[-2000:]}")
        print(tried.failures[-1], flush=True)


def try_edits(folder: Path, whole: Path, file: Path, options: Options, recipe: str) -> Tried:
    """Edits `file`, a path below `whole`, in a fresh copy each time, and runs the commands."""
    tried = Tried()
    for number in range(options.first, options.first + options.edits):
        copy = folder / "copy" / whole.name
        shutil.rmtree(copy.parent, ignore_errors=True)
        shutil.copytree(whole, copy, symlinks=True)
        changed = edit(copy / file.relative_to(whole), random.Random(f"{file.name} {number}"))
        where = f"{file.relative_to(whole)}, edit {number}, {changed}"
        if whole.name == "shards":
            try_command(folder, tried, where, "info", str(copy))
            try_command(folder, tried, where, "verify", str(copy))
            try_command(folder, tried, where, "loader", str(copy), "--seconds", "0.05", "--batch-size", "8")
            continue
        try_command(folder, tried, where, "runs", str(copy.parent))
        try_command(folder, tried, where, "watch", str(copy))
        try_command(folder, tried, where, "report", str(copy), "--out", str(folder / "report.html"))
        if number % options.resume_every == 0:
            try_command(folder, tried, where, "pretrain", recipe, "--run", str(copy))
    return tried


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.side_files", description=__doc__)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    table = Table("file", "edits", "failures", "commands by exit code", "seconds")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        (folder / "images" / "broken.jpg").write_bytes(b"no image")  # for the list of quarantined files
        recipe = tiny_recipe(folder)
        run_ranks(1, recipe, "--run", str(folder / "run"), "--stop-at-step", "8", output=folder / "output")
        for whole in (folder / "shards", folder / "run"):
            for file in side_files(whole):
                if options.files and file.name not in options.files:
                    continue
                began = time.monotonic()
                tried = try_edits(folder, whole, file, options, recipe)
                codes = ", ".join(f"{name}: {count}" for name, count in sorted(tried.codes.items()))
                seconds = f"{time.monotonic() - began:.0f}"
                row = (str(file.relative_to(whole)), str(options.edits), str(len(tried.failures)), codes, seconds)
                table.add_row(*row)
                print(f"| {' | '.join(row)} |", flush=True)
    Console().print(table)


if __name__ == "__main__":
    main()
