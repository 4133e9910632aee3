"""`maelstream report RUN [RUN ...]`: one HTML page about a run, or one that compares several runs."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from maelstream.jobs.arguments import check_output_file, parse_arguments
from maelstream.jobs.format import format_bytes
from maelstream.jobs.reporting.curves import Metrics
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.side_files import faults
from maelstream.shards.durable import atomic_write, can_write
from maelstream.shards.errors import MaelstreamError


@dataclass(frozen=True)
class Report:
    """Write RUN/report.html: state, curves, reconstructions, evaluations, recipe, data, checkpoints, environment.

    For several runs, write a page that compares their curves, recipes and evaluations.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of runs."""
    out: Path | None = None
    """File for the page. Default: RUN/report.html; for several runs, compare.html in the first run's parent folder. If
    you may not write there: runs/report-NAME.html or runs/compare.html."""
    verify: bool = False
    """Read every byte of the checkpoints instead of comparing their sizes."""


def is_run(path: Path) -> bool:
    """Whether the folder holds a run; prints a line if not: SWEEP/* also names what is no run."""
    if RunFolder(path).config.exists():
        return True
    print(f"maelstream report: {path} is not a run (it has no config.yaml); it is left out", file=sys.stderr)
    return False


def read_metrics(folder: RunFolder) -> Metrics:
    """The log steps of a run; MaelstreamError for a folder that is not a run, or that has logged no step."""
    notes = faults(folder)  # raises if this user may not read the run
    folder.any_recipe()
    for fault in notes:
        print(f"maelstream report: {fault}; the page leaves it out", file=sys.stderr)
    if not (metrics := folder.complete_metrics()):
        raise MaelstreamError(f"{folder.path} has logged no step yet; wait for its first log step")
    return metrics


def main(args: list[str]) -> int:
    """Runs `maelstream report`; returns 0 when the page is written."""
    command = parse_arguments(Report, args, "report")
    if not command.runs:
        raise MaelstreamError("RUN is missing; give the folder of one or more runs")
    paths = [path for path in command.runs if len(command.runs) == 1 or is_run(path)]
    if not paths:
        raise MaelstreamError(f"none of the {len(command.runs)} folders is a run; give the folder of one or more runs")
    runs = [(folder := RunFolder(path), read_metrics(folder)) for path in paths]
    first = paths[0]
    out = first / "report.html" if len(runs) == 1 else first.absolute().parent / "compare.html"
    if not can_write(out.parent):  # another user's run
        name = f"report-{first.absolute().name}.html" if len(runs) == 1 else out.name
        out = Path("runs") / name
        if command.out is None:
            out.parent.mkdir(exist_ok=True)
    out = command.out or out
    check_output_file("--out", out)
    from maelstream.jobs.reporting.html_report import comparison_page, run_page  # takes longer than a first error

    page = run_page(*runs[0], command.verify) if len(runs) == 1 else comparison_page(runs)
    with atomic_write(out) as file:
        file.write(page.encode())
    print(f"{out}: {format_bytes(len(page))}")
    return 0
