"""Facts about a packed dataset for people: counts, classes, sizes, resolutions, and which files were not packed.

`maelstream info` and the HTML report show them. This module imports no torch.
"""

import itertools
import json
from collections import Counter

import numpy as np

from maelstream.jobs.format import format_bytes
from maelstream.shards.dataset import QUARANTINE_NAME, Dataset

_EDGES = (0, 64, 128, 256, 384, 512, 768, 1024, 2048, 2**32)  # of the short sides' histogram, in pixels
_REASONS = 8  # shown


def facts(dataset: Dataset) -> dict[str, str]:
    """Facts from the manifest and the index, as text by name."""
    manifest = dataset.manifest
    shard_bytes = [shard["bytes"] for shard in manifest["shards"]]
    stored = "unchanged" if manifest["options"]["resize"] is None else f"short side {manifest['options']['resize']} px"
    return {
        "samples": f"{len(dataset):,}",
        "quarantined": f"{manifest['quarantined']:,}",
        "classes": _classes(dataset),
        "shards": f"{len(shard_bytes):,}, {format_bytes(sum(shard_bytes))} in all",
        "formats": ", ".join(f"{extension} {count:,}" for extension, count in sorted(manifest["formats"].items())),
        "images": "in the shards that `maelstream index` adopted" if manifest["adopted"] else stored,
        "bytes per sample": _range(dataset.size[:], ""),
        "width": _range(dataset.width[:], " px"),
        "height": _range(dataset.height[:], " px"),
    }


def _range(numbers: np.ndarray, unit: str) -> str:
    return f"{numbers.min():,} to {numbers.max():,}{unit}, median {np.median(numbers):,.0f}"


def _classes(dataset: Dataset) -> str:
    """Number of classes, and the smallest and largest number of samples in a class."""
    if not dataset.classes:
        return "none: no labels"
    per_class = np.bincount(dataset.label, minlength=len(dataset.classes))
    return f"{len(dataset.classes):,}, {per_class.min():,} to {per_class.max():,} samples each"


def short_sides(dataset: Dataset) -> dict[str, int]:
    """Histogram of short sides: the number of samples per range of lengths; empty ranges are left out."""
    counts, _ = np.histogram(np.minimum(dataset.width, dataset.height), bins=_EDGES)
    names = [
        f"{low:,} px and more" if high == _EDGES[-1] else f"{low:,} to {high - 1:,} px"
        for low, high in itertools.pairwise(_EDGES)
    ]
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}


def quarantined_files(dataset: Dataset) -> list[tuple[str, str, str]]:
    """Files that were not packed: one row per reason, with the number of files, the reason and the first file."""
    lines = dataset.storage.read(QUARANTINE_NAME).decode(errors="replace").splitlines()
    rows = []
    firsts: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for line in lines:
        try:
            found = json.loads(line)
            source, reason = str(found["source"]), str(found["reason"])
        except (ValueError, KeyError, TypeError, RecursionError):
            source, reason = "", f"unreadable: a damaged line of {QUARANTINE_NAME}"
        firsts.setdefault(reason, source)
        counts[reason] += 1
    for reason, count in counts.most_common(_REASONS):
        rows.append((f"{count:,}", reason, firsts[reason]))
    if len(counts) > _REASONS:
        rest = sum(counts.values()) - sum(count for _, count in counts.most_common(_REASONS))
        rows.append((f"{rest:,}", "other reasons", ""))
    return rows
