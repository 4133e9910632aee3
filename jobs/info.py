"""`maelstream info DST`: shows what a packed dataset contains."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from maelstream.jobs.arguments import parse_arguments
from maelstream.jobs.reporting.dataset_facts import facts, quarantined_files, short_sides
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError


@dataclass(frozen=True)
class Info:
    """Show counts, classes, sizes, formats and resolutions of a packed dataset."""

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """A packed dataset; a folder, or a URI such as s3://bucket/folder."""
    plot: Path | None = None
    """Also plot the distributions to this file: FILE.png, .pdf or .svg."""


def summary(dataset: Dataset) -> Table:
    """One row per fact."""
    table = Table(title=f"{dataset.manifest['name']} / {dataset.manifest['split']}", show_header=False)
    for name, value in facts(dataset).items():
        table.add_row(name, value)
    return table


def resolutions(dataset: Dataset) -> Table:
    """Histogram of the images' short sides."""
    counts = short_sides(dataset)
    table = Table("short side", "samples", "", title="resolutions")
    for side, count in counts.items():
        table.add_row(side, f"{count:,}", "█" * max(1, round(40 * count / max(counts.values()))))
    return table


def plot(dataset: Dataset, file: Path) -> None:
    """Plots the distributions of resolution, shape, bytes and class sizes; the suffix selects the file format."""
    from matplotlib.figure import Figure  # takes a second to import; Figure needs no display

    width, height = dataset.width[:], dataset.height[:]
    short, long = np.minimum(width, height), np.maximum(width, height)
    ratio, kib = long / short, dataset.size[:] / 2**10
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    panels = [
        ("short side", "pixels", short, np.geomspace(short.min(), short.max() * 1.001, 50), "log"),
        ("long side : short side", "ratio", ratio, np.linspace(1, max(2, np.quantile(ratio, 0.995)), 50), "linear"),
        ("bytes per sample", "KiB", kib, np.geomspace(kib.min(), kib.max() * 1.001, 50), "log"),
    ]
    for axis, (title, unit, values, bins, scale) in zip(axes, panels, strict=False):
        axis.hist(values, bins=bins, color="#3b6ea5")
        axis.axvline(np.median(values), color="#c0504d", linewidth=1.5, label=f"median {np.median(values):,.4g}")
        axis.set(title=title, xlabel=unit, ylabel="samples", xscale=scale)
        axis.legend(frameon=False)
    if dataset.classes:
        per_class = np.sort(np.bincount(dataset.label, minlength=len(dataset.classes)))[::-1]
        axes[3].stairs(per_class, fill=True, color="#3b6ea5")
        axes[3].set(title="samples per class", xlabel="class, largest first", ylabel="samples", ylim=(0, None))
    else:
        axes[3].axis("off")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{dataset.manifest['name']} / {dataset.manifest['split']}: {len(dataset):,} samples")
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise MaelstreamError(f"--plot {file} cannot be written ({error})") from None


def main(args: list[str]) -> int:
    """Entry point of `maelstream info`."""
    command = parse_arguments(Info, args, "info")
    dataset = Dataset.open(command.dst)
    console = Console(markup=False, emoji=False)
    console.print(summary(dataset))
    console.print(resolutions(dataset))
    if dataset.manifest["quarantined"]:
        table = Table("files", "reason", "first file", title="not packed")
        for row in quarantined_files(dataset):
            table.add_row(*row)
        console.print(table)
    if command.plot is not None:
        plot(dataset, command.plot)
        console.print(f"distributions: {command.plot}")
    return 0
