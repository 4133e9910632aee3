"""`maelstream runs DIR`: the runs below a folder and how they stand, from their files alone."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from maelstream.jobs.arguments import parsed
from maelstream.jobs.evaluation.results import best_of_each, read_evaluations
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.status import is_locked, read_status
from maelstream.shards.errors import MaelstreamError


@dataclass(frozen=True)
class Runs:
    """List the runs below a folder with their state."""

    dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")] = Path("runs")
    """A folder of runs."""


def state_of(folder: RunFolder) -> str:
    """In a word or a line: `running`, `finished`, `stopped: why`, `failed: why`, or `died` without a word."""
    status = read_status(folder.status)
    if status is None:
        return "not begun"
    if status.state == "running" and not is_locked(folder.lock):
        return "died"
    return f"{status.state}: {status.why}" if status.why else status.state


def ago(seconds: float) -> str:
    """Roughly, in one unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def listing(folders: list[RunFolder]) -> Table:
    """A row a run."""
    best = [best_of_each(read_evaluations(folder.path)) for folder in folders]
    table = Table("run", "state", "step", "loss", "images/s", "ranks", "last heard of")
    if any(best):  # the line is full enough without
        table.add_column("best top-1, %")
    for folder, evaluated in zip(folders, best, strict=True):
        status, metrics = read_status(folder.status), folder.read_metrics()
        last = metrics[-1] if metrics else {}
        table.add_row(
            str(folder.path),
            state_of(folder),
            f"{status.step:,}/{status.total_steps:,}" if status else "",
            f"{last['loss']:.4f}" if last.get("loss") is not None else "",
            f"{last['images_per_s']:,.0f}" if last else "",
            str(status.ranks) if status else "",
            ago(time.time() - status.updated) if status else "",
            *([evaluated] if any(best) else []),
        )
    return table


def main(args: list[str]) -> int:
    """`maelstream runs`."""
    command = parsed(Runs, args, "runs")
    folders = [RunFolder(path.parent) for path in sorted(command.dir.rglob("config.yaml"))]
    if not folders:
        raise MaelstreamError(f"{command.dir} holds no run; `maelstream pretrain RECIPE --run DIR` makes one")
    Console().print(listing(folders))
    return 0
