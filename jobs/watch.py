"""`maelstream watch RUN`: shows the progress of a run in another terminal, from the run's files only."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from maelstream.jobs.arguments import parse_arguments
from maelstream.jobs.format import format_ago
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.side_files import faults
from maelstream.jobs.run_folder.status import read_status, state_of

_REFRESH_S = 1.0
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Watch:
    """Show the state, progress, loss and rate of a run. Ctrl-C ends this command, not the run."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run's folder."""


def curve(values: list[float], width: int) -> str:
    """The values as one line of block characters, subsampled to at most `width` of them."""
    shown = [values[len(values) * n // width] for n in range(width)] if len(values) > width else values
    low, high = min(shown), max(shown)
    return "".join(_BLOCKS[round((value - low) / ((high - low) or 1) * (len(_BLOCKS) - 1))] for value in shown)


def progress_view(folder: RunFolder, metrics: list[dict[str, Any]], width: int) -> RenderableType:
    """The current facts of the run, its progress bar and its loss curve."""
    status = read_status(folder.status)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("run", str(folder.path))
    facts.add_row("state", state_of(folder))
    for fault in faults(folder):
        facts.add_row("note", fault)
    if status is None or not metrics:
        return facts
    last, losses = metrics[-1], [line["loss"] for line in metrics if line["loss"] is not None]
    facts.add_row(
        "updated", f"{format_ago(time.time() - status.updated)}, {status.ranks} ranks, rank 0 on {status.host}"
    )
    facts.add_row("step", f"{status.step:,} of {status.total_steps:,}, epoch {last['epoch']:.2f}")
    if losses:
        facts.add_row("loss", f"{losses[-1]:.4f}, lowest {min(losses):.4f}, first {losses[0]:.4f}")
    facts.add_row("rate", f"{last['images_per_s']:,.0f} images/s, data wait {last['data_wait']:.1%}")
    facts.add_row("memory", f"{last['memory_gib']:.1f} GiB on rank 0")
    spikes = sum(line["spike"] for line in metrics)
    facts.add_row("health", f"{last['skipped']} steps skipped for NaN or Inf, {spikes} loss spikes")
    checkpoints = folder.checkpoints.steps()
    facts.add_row("saved", f"step {checkpoints[-1]:,}" if checkpoints else "no checkpoint yet")
    bar = ProgressBar(total=status.total_steps, completed=status.step, width=width)
    return Group(facts, Padding(bar), Text(curve(losses, width)) if losses else "")  # a bar alone ends no line


def main(args: list[str]) -> int:
    """Entry point of `maelstream watch`: updates until the run ends, or prints once if the output is not a terminal."""
    command = parse_arguments(Watch, args, "watch")
    folder, console = RunFolder(command.run), Console(markup=False, emoji=False)
    faults(folder)  # raises if this user may not read the run
    folder.any_recipe()  # raises if the folder is not a run
    width = max(20, min(80, console.width - 2))
    if not console.is_terminal:
        console.print(progress_view(folder, folder.complete_metrics(), width))
        return 0
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(progress_view(folder, folder.complete_metrics(), width), refresh=True)
                if state_of(folder) != "running":
                    return 0
                time.sleep(_REFRESH_S)
    except KeyboardInterrupt:
        return 0
