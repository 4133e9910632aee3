"""`maelstream info DST`: what a packed dataset holds."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from shards.dataset import Dataset

_EDGES = (0, 64, 128, 256, 384, 512, 768, 1024, 2048, 2**32)  # short sides, in pixels


@dataclass(frozen=True)
class Info:
    """Counts, classes, sizes, formats and resolutions of a packed dataset."""

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """A packed dataset; a folder, or a URI such as s3://bucket/folder."""


def summary(dataset: Dataset) -> Table:
    """What the manifest and the index tell, a row a fact."""
    manifest = dataset.manifest
    per_class = np.bincount(dataset.label, minlength=len(dataset.classes))
    shard_bytes = [shard["bytes"] for shard in manifest["shards"]]
    table = Table(title=f"{manifest['name']} / {manifest['split']}", show_header=False)
    for name, value in {
        "samples": f"{len(dataset):,}",
        "quarantined": f"{manifest['quarantined']:,}",
        "classes": f"{len(dataset.classes):,}, {per_class.min():,} to {per_class.max():,} samples each",
        "shards": f"{len(shard_bytes):,}, {sum(shard_bytes) / 2**20:,.1f} MiB in all",
        "formats": ", ".join(f"{extension} {count:,}" for extension, count in sorted(manifest["formats"].items())),
        "bytes a sample": f"{dataset.size.min():,} to {dataset.size.max():,}, median {np.median(dataset.size):,.0f}",
        "width": f"{dataset.width.min():,} to {dataset.width.max():,} px, median {np.median(dataset.width):,.0f}",
        "height": f"{dataset.height.min():,} to {dataset.height.max():,} px, median {np.median(dataset.height):,.0f}",
    }.items():
        table.add_row(name, value)
    return table


def resolutions(dataset: Dataset) -> Table:
    """Histogram of short sides."""
    counts, _ = np.histogram(np.minimum(dataset.width, dataset.height), bins=_EDGES)
    table = Table("short side", "samples", "", title="resolutions")
    for low, high, count in zip(_EDGES, _EDGES[1:], counts, strict=False):
        if count:
            side = f"{low:,} px and more" if high == _EDGES[-1] else f"{low:,} to {high - 1:,} px"
            table.add_row(side, f"{count:,}", "█" * max(1, round(40 * count / counts.max())))
    return table


def main(args: list[str]) -> int:
    """`maelstream info`."""
    command = tyro.cli(Info, args=args, prog="maelstream info")
    dataset = Dataset.open(command.dst)
    console = Console()
    console.print(summary(dataset))
    console.print(resolutions(dataset))
    return 0
