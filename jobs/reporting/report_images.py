"""The pictures of `RUN/reconstructions/` as a report embeds them: series of the same images, by epoch and ratio."""

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

_MOST = 24  # entries of a series: at 224 px each is a few hundred KiB
_TINY = 96  # pixels of an image's side; up to it files are embedded as they are, and shown with hard edges
_QUALITY = 82


@dataclass(frozen=True)
class Series:
    """Pictures of the same images."""

    name: str
    images: str
    note: str
    tiny: bool
    left_out: int
    ratios: list[float]
    entries: list[dict[str, Any]]
    """`label`, and `files` by ratio: `src` and `loss`; the youngest last."""


def album(folder: RunFolder, epoch_of: float | None) -> list[Series]:
    """Of a run, that of its own checkpoints and images first; `epoch_of` a step, None where that is not known."""
    found: dict[tuple[str, bool], list[tuple[Path, ReconstructionInfo]]] = {}
    for path in sorted(folder.reconstructions.glob("*/about.json")):
        if (about := read_info(path.parent)) is not None:
            found.setdefault((about.images, about.step is None), []).append((path.parent, about))
    series = [_series(images, entries, epoch_of) for (images, _), entries in found.items()]
    return sorted(series, key=lambda one: -len(one.entries) - one.left_out)


def _series(images: str, found: list[tuple[Path, ReconstructionInfo]], epoch_of: float | None) -> Series:
    found = sorted(found, key=lambda one: one[1].step or 0)
    chosen = [found[n] for n in np.unique(np.linspace(0, len(found) - 1, min(len(found), _MOST)).round().astype(int))]
    entries, widest = [], 0
    for folder, about in chosen:
        files = {}
        for ratio, loss in about.losses.items():
            path = folder / about.file_name(ratio)
            try:
                with Image.open(path) as sheet:
                    widest = max(widest, sheet.width // len(COLUMNS))
                    files[ratio] = {"src": _embedded(sheet, path), "loss": loss}
            except OSError as error:
                raise MaelstreamError(
                    f"{path} cannot be read ({error}); remove {folder}, or write it again by `maelstream reconstruct`"
                ) from None
        entries.append({"label": _label(about, epoch_of), "files": files})
    youngest = found[-1][1]
    return Series(
        name=f"{len(youngest.names)} images of {images}",
        images=f"From the top: {', '.join(youngest.names)} of {images}",
        note=youngest.note,
        tiny=widest <= _TINY,
        left_out=len(found) - len(chosen),
        ratios=sorted({float(ratio) for _, about in chosen for ratio in about.losses}),
        entries=entries,
    )


def _label(about: ReconstructionInfo, epoch_of: float | None) -> str:
    if about.step is None:
        return about.weights
    return f"step {about.step:,}" if epoch_of is None else f"{about.step * epoch_of:.4g} (step {about.step:,})"


def _embedded(sheet: Image.Image, path: Path) -> str:
    if sheet.width // len(COLUMNS) <= _TINY:
        return data_uri(path.read_bytes(), "png")
    smaller = io.BytesIO()
    sheet.save(smaller, "WEBP", quality=_QUALITY)
    return data_uri(smaller.getvalue(), "webp")


def data_uri(content: bytes, kind: str) -> str:
    """An image inside a page."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
