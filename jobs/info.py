"""`maelstream info DST`: what a packed dataset holds."""

import itertools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from maelstream.jobs.arguments import parsed
from maelstream.shards.dataset import QUARANTINE_NAME, Dataset
from maelstream.shards.errors import MaelstreamError

_EDGES = (0, 64, 128, 256, 384, 512, 768, 1024, 2048, 2**32)  # short sides, in pixels
_REASONS = 8  # shown


@dataclass(frozen=True)
class Info:
    """Counts, classes, sizes, formats and resolutions of a packed dataset."""

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """A packed dataset; a folder, or a URI such as s3://bucket/folder."""
    plot: Path | None = None
    """Write a picture of the distributions, too: FILE.png (or .pdf, .svg)."""


def facts(dataset: Dataset) -> dict[str, str]:
    """What the manifest and the index tell."""
    manifest = dataset.manifest
    shard_bytes = [shard["bytes"] for shard in manifest["shards"]]
    kept = "as they were" if manifest["options"]["resize"] is None else f"short side {manifest['options']['resize']} px"
    return {
        "samples": f"{len(dataset):,}",
        "quarantined": f"{manifest['quarantined']:,}",
        "classes": _classes(dataset),
        "shards": f"{len(shard_bytes):,}, {sum(shard_bytes) / 2**20:,.1f} MiB in all",
        "formats": ", ".join(f"{extension} {count:,}" for extension, count in sorted(manifest["formats"].items())),
        "images": "adopted where they lay" if manifest["adopted"] else kept,
        "bytes a sample": f"{dataset.size.min():,} to {dataset.size.max():,}, median {np.median(dataset.size):,.0f}",
        "width": f"{dataset.width.min():,} to {dataset.width.max():,} px, median {np.median(dataset.width):,.0f}",
        "height": f"{dataset.height.min():,} to {dataset.height.max():,} px, median {np.median(dataset.height):,.0f}",
    }


def summary(dataset: Dataset) -> Table:
    """A row a fact."""
    table = Table(title=f"{dataset.manifest['name']} / {dataset.manifest['split']}", show_header=False)
    for name, value in facts(dataset).items():
        table.add_row(name, value)
    return table


def _classes(dataset: Dataset) -> str:
    if not dataset.classes:
        return "none: no labels"
    per_class = np.bincount(dataset.label, minlength=len(dataset.classes))
    return f"{len(dataset.classes):,}, {per_class.min():,} to {per_class.max():,} samples each"


def short_sides(dataset: Dataset) -> dict[str, int]:
    """Samples by the length of their short side, in a few steps of it; those that there are."""
    counts, _ = np.histogram(np.minimum(dataset.width, dataset.height), bins=_EDGES)
    names = [
        f"{low:,} px and more" if high == _EDGES[-1] else f"{low:,} to {high - 1:,} px"
        for low, high in itertools.pairwise(_EDGES)
    ]
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}


def resolutions(dataset: Dataset) -> Table:
    """Histogram of short sides."""
    counts = short_sides(dataset)
    table = Table("short side", "samples", "", title="resolutions")
    for side, count in counts.items():
        table.add_row(side, f"{count:,}", "█" * max(1, round(40 * count / max(counts.values()))))
    return table


def left_out(dataset: Dataset) -> list[tuple[str, str, str]]:
    """What did not enter, by reason: number of files, reason, the first of them."""
    lines = dataset.storage.read(QUARANTINE_NAME).decode().splitlines()
    rows = []
    firsts: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for line in map(json.loads, lines):
        firsts.setdefault(line["reason"], line["source"])
        counts[line["reason"]] += 1
    for reason, count in counts.most_common(_REASONS):
        rows.append((f"{count:,}", reason, firsts[reason]))
    if len(counts) > _REASONS:
        rest = sum(counts.values()) - sum(count for _, count in counts.most_common(_REASONS))
        rows.append((f"{rest:,}", "other reasons", ""))
    return rows


def plot(dataset: Dataset, file: Path) -> None:
    """Writes distributions of resolution, shape, bytes and class sizes; the format is the suffix's."""
    from matplotlib.figure import Figure  # takes a second to import, and no screen to draw on

    short, long = np.minimum(dataset.width, dataset.height), np.maximum(dataset.width, dataset.height)
    ratio, kib = long / short, dataset.size / 2**10
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    panels = [
        ("short side", "pixels", short, np.geomspace(short.min(), short.max() * 1.001, 50), "log"),
        ("long side : short side", "ratio", ratio, np.linspace(1, max(2, np.quantile(ratio, 0.995)), 50), "linear"),
        ("bytes a sample", "KiB", kib, np.geomspace(kib.min(), kib.max() * 1.001, 50), "log"),
    ]
    for axis, (title, unit, values, bins, scale) in zip(axes, panels, strict=False):
        axis.hist(values, bins=bins, color="#3b6ea5")
        axis.axvline(np.median(values), color="#c0504d", linewidth=1.5, label=f"median {np.median(values):,.4g}")
        axis.set(title=title, xlabel=unit, ylabel="samples", xscale=scale)
        axis.legend(frameon=False)
    if dataset.classes:
        per_class = np.sort(np.bincount(dataset.label, minlength=len(dataset.classes)))[::-1]
        axes[3].stairs(per_class, fill=True, color="#3b6ea5")
        axes[3].set(title="samples by class", xlabel="class, the largest first", ylabel="samples", ylim=(0, None))
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
    """`maelstream info`."""
    command = parsed(Info, args, "info")
    dataset = Dataset.open(command.dst)
    console = Console()
    console.print(summary(dataset))
    console.print(resolutions(dataset))
    if dataset.manifest["quarantined"]:
        table = Table("files", "reason", "the first", title="left out")
        for row in left_out(dataset):
            table.add_row(*row)
        console.print(table)
    if command.plot is not None:
        plot(dataset, command.plot)
        console.print(f"distributions: {command.plot}")
    return 0
