"""The chart of a profile: for each stage the hardware's limit, its rate alone, and the rate of the run end to end."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from maelstream.jobs.format import format_rate
from maelstream.shards.errors import MaelstreamError

_LIMIT, _ALONE, _BOTTLENECK, _RUN = "#d9dee5", "#3b6ea5", "#c0504d", "#333333"


def draw_stage_chart(figures: dict[str, Any], file: Path) -> None:
    """Writes the chart to `file`, in the format of its suffix.

    Raises:
        MaelstreamError: the file cannot be written.
    """
    stages = {name: stage for name, stage in figures["stages"].items() if stage["images_per_s"] is not None}
    figure = Figure(figsize=(9, 0.62 * len(stages) + 1.9), layout="constrained")
    axis = figure.subplots()
    rates = [stage["images_per_s"] for stage in stages.values()]
    limits = [stage["limit_images_per_s"] for stage in stages.values() if stage["limit_images_per_s"]]
    run_rate = figures["whole"]["images_per_s"] if figures["whole"] else None
    least = min([*rates, *limits, *([run_rate] if run_rate else [])]) / 3
    for row, (name, stage) in enumerate(stages.items()):
        limit, alone = stage["limit_images_per_s"], stage["images_per_s"]
        if limit:
            axis.barh(row, limit - least, left=least, height=0.72, color=_LIMIT)
        colour = _BOTTLENECK if name == figures["verdict"]["limit"] else _ALONE
        axis.barh(row, alone - least, left=least, height=0.4, color=colour)
        background = {"fc": "white", "ec": "none", "pad": 1}
        axis.text(alone * 1.06, row, format_rate(alone), va="center", fontsize=9, bbox=background)
    if run_rate:
        axis.axvline(run_rate, color=_RUN, linewidth=1.5, linestyle="--")
        axis.text(run_rate, -0.75, f" end to end: {format_rate(run_rate)}", color=_RUN, fontsize=9, va="bottom")
    axis.set_xscale("log")
    axis.set(xlim=(least, 4 * max([*rates, *limits])), xlabel="images/s", ylim=(len(stages) - 0.4, -0.8))
    axis.set_yticks(range(len(stages)), list(stages))
    axis.spines[["top", "right"]].set_visible(False)
    legend = {"hardware's limit": _LIMIT, "alone": _ALONE, "alone; limits the run": _BOTTLENECK}
    handles = [Patch(color=colour, label=label) for label, colour in legend.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"{figures['recipe']} on {figures['machine']['name']}", fontsize=11)
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise MaelstreamError(f"--out {file} cannot be written ({error})") from None
