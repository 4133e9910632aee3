"""The images that a report embeds from `RUN/reconstructions/`, grouped into series by epoch and mask ratio."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maelstream.jobs.reporting.reconstruction_files import COLUMNS, ReconstructionInfo, read_info
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.shards.errors import MaelstreamError

_MAX_ENTRIES = 24  # per series; at 224 px each entry is a few hundred KiB
_TINY = 96  # pixels; up to this width an image is embedded unchanged and magnified without smoothing
_QUALITY = 82


@dataclass(frozen=True)
class ImageSeries:
    """Reconstructions of the same images by several checkpoints and at several mask ratios."""

    name: str
    images: str
    note: str
    tiny: bool
    """Whether the images are magnified without smoothing."""
    left_out: int
    """Number of checkpoints that were reconstructed and are not in `entries`."""
    ratios: list[float]
    entries: list[dict[str, Any]]
    """One dict per checkpoint, oldest first: `label`, and `files` by ratio, each with its `src` and `loss`."""


def image_series(folder: RunFolder, epochs_per_step: float | None) -> list[ImageSeries]:
    """All series of a run, the longest first; labels give epochs unless `epochs_per_step` is None.

    Raises:
        MaelstreamError: an image file that cannot be read.
    """
    found: dict[tuple[str, tuple[str, ...], bool, bool], list[tuple[Path, ReconstructionInfo]]] = {}
    for path in sorted(folder.reconstructions.glob("*/about.json")):
        if (info := read_info(path.parent)) is not None:
            # `maelstream reconstruct` adds the name of the images.
            by_the_run = info.step is not None and path.parent.name == folder.checkpoints.at(info.step).name
            key = info.images, info.names, info.step is None, by_the_run
            found.setdefault(key, []).append((path.parent, info))
    series = [_series_of(images, entries, epochs_per_step) for (images, *_), entries in found.items()]
    return sorted(series, key=lambda one: -len(one.entries) - one.left_out)


def _series_of(images: str, found: list[tuple[Path, ReconstructionInfo]], epochs_per_step: float | None) -> ImageSeries:
    found = sorted(found, key=lambda one: one[1].step or 0)
    count = min(len(found), _MAX_ENTRIES)
    chosen = [found[n] for n in np.unique(np.linspace(0, len(found) - 1, count).round().astype(int))]
    entries, widest = [], 0
    for folder, info in chosen:
        files = {}
        for ratio, loss in info.losses.items():
            path = folder / info.file_name(ratio)
            try:
                with Image.open(path) as sheet:
                    widest = max(widest, sheet.width // len(COLUMNS))
                    files[ratio] = {"src": _embedded(sheet, path), "loss": loss}
            except OSError as error:
                raise MaelstreamError(
                    f"{path} cannot be read ({error}); remove {folder}, or write it again with `maelstream reconstruct`"
                ) from None
        entries.append({"label": _label(info, epochs_per_step), "files": files})
    newest = found[-1][1]
    return ImageSeries(
        name=f"{len(newest.names)} images of {images}",
        images=f"From the top: {', '.join(newest.names)} of {images}",
        note=newest.note,
        tiny=widest <= _TINY,
        left_out=len(found) - len(chosen),
        ratios=sorted({float(ratio) for _, info in chosen for ratio in info.losses}),
        entries=entries,
    )


def _label(info: ReconstructionInfo, epochs_per_step: float | None) -> str:
    if info.step is None:
        return info.weights
    step = f"step {info.step:,}"
    return step if epochs_per_step is None else f"{info.step * epochs_per_step:.4g} ({step})"


def _embedded(sheet: Image.Image, path: Path) -> str:
    if sheet.width // len(COLUMNS) <= _TINY:
        return data_uri(path.read_bytes(), "png")
    compressed = io.BytesIO()
    sheet.save(compressed, "WEBP", quality=_QUALITY)
    return data_uri(compressed.getvalue(), "webp")


def data_uri(content: bytes, kind: str) -> str:
    """An image file as a data URI, to embed in a page."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
