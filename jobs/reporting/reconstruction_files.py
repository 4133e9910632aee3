"""Files in `RUN/reconstructions/`: one folder per pair of weights and images, in the form of the paper's figure 4.

ratio-0.75.png ...    one row per image, one column per entry of `COLUMNS`, at full size, with transparent gaps
grid.png              all ratios next to each other, with titles; only `maelstream reconstruct` writes it
about.json            `ReconstructionInfo`; written last: a folder without it is incomplete and is ignored
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from pydantic import TypeAdapter

from maelstream.model.config import Target
from maelstream.shards.durable import atomic_write

if TYPE_CHECKING:  # `maelstream report` reads these files without torch
    from maelstream.model.mae import Reconstruction

COLUMNS = ("original", "masked", "reconstructed", "with visible patches")
NOTES: dict[Target, str] = {
    "pixel": "",
    "normalised_pixel": "Each predicted patch is shown with the original patch's own mean and variance, which this "
    "target leaves out.",
    "pca": "Each patch shows only its predicted components.",
    "token": "The tokenizer's decoder shows the likeliest code of each patch.",
}
"""How the prediction becomes an image, for targets other than plain pixels."""
_GAP = 2  # pixels


@dataclass(frozen=True)
class ReconstructionInfo:
    """The content of `about.json`: which weights and images the folder shows."""

    weights: str
    """Name of the checkpoint, or of the file or folder that the weights came from."""
    step: int | None
    """Training step of the checkpoint; None for weights from outside this run."""
    images: str
    """The dataset or folder of the images, as the user named it."""
    names: tuple[str, ...]
    """Key or file name of each image, from the top row down."""
    losses: dict[str, float]
    """Loss on removed patches by mask ratio, which is written as in the file names; smallest ratio first."""
    note: str

    @classmethod
    def describe(
        cls,
        results: "dict[str, Reconstruction]",
        weights: str,
        step: int | None,
        images: str,
        names: tuple[str, ...],
        target: Target,
    ) -> "ReconstructionInfo":
        """Describes `results`, with their losses and the note for `target`."""
        losses = {ratio: result.loss.item() for ratio, result in results.items()}
        return cls(weights, step, images, names, losses, NOTES[target])

    def file_name(self, ratio: str) -> str:
        return f"ratio-{ratio}.png"


def image_columns(result: "Reconstruction") -> list[UInt8[np.ndarray, "b h w 3"]]:
    """Four versions of each image, in the order of `COLUMNS`."""
    versions = result.original, result.masked, result.reconstructed, result.reconstructed_with_visible
    return [(255 * images).round().byte().permute(0, 2, 3, 1).numpy() for images in versions]


def contact_sheet(result: "Reconstruction") -> UInt8[np.ndarray, "h w 4"]:
    """An RGBA image with one row per image and one column per entry of `COLUMNS`."""
    rows, height, width, _ = image_columns(result)[0].shape
    step_down, step_right = height + _GAP, width + _GAP
    sheet = np.zeros((rows * step_down - _GAP, len(COLUMNS) * step_right - _GAP, 4), np.uint8)
    for column, images in enumerate(image_columns(result)):
        for row, image in enumerate(images):
            cell = sheet[row * step_down :, column * step_right :][:height, :width]
            cell[:, :, :3], cell[:, :, 3] = image, 255
    return sheet


def write_reconstructions(folder: Path, results: "dict[str, Reconstruction]", info: ReconstructionInfo) -> None:
    """Writes one contact sheet per ratio of `results` to `folder`; replaces older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").unlink(missing_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for ratio, result in results.items():
        with atomic_write(folder / info.file_name(ratio)) as file:
            Image.fromarray(contact_sheet(result)).save(file, "PNG")
    with atomic_write(folder / "about.json") as file:
        file.write(json.dumps(asdict(info)).encode() + b"\n")


def read_info(folder: Path) -> ReconstructionInfo | None:
    """Reads `about.json`; None when the folder is incomplete or from another version."""
    try:
        return TypeAdapter(ReconstructionInfo).validate_json((folder / "about.json").read_bytes())
    except (OSError, ValueError):
        return None


def draw_grid(results: "dict[str, Reconstruction]", info: ReconstructionInfo, path: Path) -> None:
    """Writes one figure: the originals, then three columns per ratio. The suffix of `path` sets the format."""
    from matplotlib.figure import Figure  # takes a second to import

    rows = len(info.names)
    width, height = 1 + 3 * len(results), rows + 0.55  # in images
    figure = Figure(figsize=(1.5 * width, 1.5 * height))
    axes = figure.subplots(rows, width, squeeze=False)
    for number, (ratio, result) in enumerate(results.items()):
        original, *others = image_columns(result)
        first = 1 + 3 * number
        for column, (title, images) in enumerate(zip(COLUMNS[1:], others, strict=True), first):
            axes[0, column].set_title(title, fontsize=8)
            for row in range(rows):
                axes[row, column].imshow(images[row])
                axes[row, 0].imshow(original[row])
        text = f"{float(ratio):.0%} removed, loss {info.losses[ratio]:.3f}"
        figure.text((first + 1.5) / width, 1 - 0.03 / height, text, ha="center", va="top", fontsize=9, weight="bold")
    axes[0, 0].set_title(COLUMNS[0], fontsize=8)
    for axis in axes.flat:
        axis.axis("off")
    figure.text(0.004, 0.03 / height, f"{info.weights}.  {info.note}", fontsize=7, va="bottom")
    figure.subplots_adjust(0.003, 0.18 / height, 0.997, 1 - 0.37 / height, wspace=0.03, hspace=0.03)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
