"""`maelstream runs DIR`: lists the runs below a folder with their state, from their files only."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from maelstream.jobs.arguments import parse_arguments
from maelstream.jobs.evaluation.results import Evaluation, best_of_each, read_evaluations
from maelstream.jobs.format import format_ago
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.side_files import faults
from maelstream.jobs.run_folder.status import read_status, state_of
from maelstream.shards.errors import MaelstreamError


@dataclass(frozen=True)
class Runs:
    """List the runs below a folder with their state."""

    dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")] = Path("runs")
    """A folder of runs."""


def runs_table(folders: list[RunFolder]) -> Table:
    """One row per run."""
    best = [best_of_each(evaluations(folder)) for folder in folders]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for text in ("run", "state"):
        table.add_column(text, overflow="fold")  # names of two runs often differ only at their end
    for number in ("step", "loss", "images/s", "ranks"):
        table.add_column(number, no_wrap=True, justify="right")
    table.add_column("last update")
    if any(best):  # otherwise the column would only make a wide table wider
        table.add_column("best top-1, %", overflow="fold")
    for folder, evaluated in zip(folders, best, strict=True):
        status, metrics = read_status(folder.status), folder.read_metrics()
        last = metrics[-1] if metrics else {}
        table.add_row(
            str(folder.path),
            state_of(folder),
            f"{status.step:,}/{status.total_steps:,}" if status else "",
            f"{last['loss']:.4f}" if last.get("loss") is not None else "",
            f"{last['images_per_s']:,.0f}" if "images_per_s" in last else "",
            str(status.ranks) if status else "",
            format_ago(time.time() - status.updated) if status else "",
            *([evaluated] if any(best) else []),
        )
    return table


def evaluations(folder: RunFolder) -> list[Evaluation]:
    """The evaluations of a run; prints an error about a damaged file, so that the other runs are listed."""
    try:
        return read_evaluations(folder.path)
    except (MaelstreamError, OSError) as error:
        print(f"maelstream runs: {error}", file=sys.stderr)
        return []


def is_readable(folder: RunFolder) -> bool:
    """Whether this user can read the run; prints why not, and what is damaged in a run that can be read."""
    try:
        notes = faults(folder)
    except MaelstreamError as error:
        print(f"maelstream runs: {error}; {folder.path} is left out", file=sys.stderr)
        return False
    for note in notes:
        print(f"maelstream runs: {note}", file=sys.stderr)
    return True


def main(args: list[str]) -> int:
    """Entry point of `maelstream runs`."""
    command = parse_arguments(Runs, args, "runs")
    if not command.dir.is_dir():
        raise MaelstreamError(f"there is no folder {command.dir}; give one that holds runs: `maelstream runs DIR`")
    # `walk` follows no links, and passes over folders that cannot be read or that another program removes meanwhile.
    found = {Path(folder) for folder, _, files in os.walk(command.dir) if "config.yaml" in files}
    linked = {path.parent for path in command.dir.glob("*/config.yaml")}
    folders = [RunFolder(folder) for folder in sorted(found | linked)]
    if not folders:
        raise MaelstreamError(f"{command.dir} holds no run; start one with `maelstream pretrain RECIPE --run DIR`")
    Console(markup=False, emoji=False).print(runs_table([folder for folder in folders if is_readable(folder)]))
    return 0
