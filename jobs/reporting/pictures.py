"""The pictures of `RUN/reconstructions/`: a folder for each set of weights and images (paper, figure 4).

ratio-0.75.png ...    a row an image, a column each of `COLUMNS`, pixel for pixel, gaps transparent
grid.png              all ratios side by side with titles; from `maelstream reconstruct` alone
about.json            `About`; written last: a folder without it is not whole
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from PIL import Image
from pydantic import TypeAdapter

from maelstream.model.mae import Reconstruction
from maelstream.model.patches import Target
from maelstream.shards.durable import written_whole

COLUMNS = ("original", "masked", "reconstructed", "with visible patches")
NOTES: dict[Target, str] = {
    "pixel": "",
    "normalised_pixel": "Each predicted patch is shown with the original patch's own mean and variance, which this "
    "target leaves out.",
    "pca": "Of each patch the predicted components alone are shown.",
    "token": "The tokenizer's decoder shows the likeliest code of each patch.",
}
"""What a picture does not tell by itself of a target that is not plain pixels."""
_GAP = 2  # pixels


@dataclass(frozen=True)
class About:
    """What the pictures of a folder show."""

    weights: str
    """Name of the checkpoint, or of others' weights."""
    step: int | None
    """None for weights that are not this run's."""
    images: str
    """The dataset or folder that they are of, as it was named."""
    names: tuple[str, ...]
    """Key or file of each, from the top row down."""
    losses: dict[str, float]
    """On removed patches, by ratio as in the files' names; smallest ratio first."""
    note: str

    @classmethod
    def of(
        cls,
        results: dict[str, Reconstruction],
        weights: str,
        step: int | None,
        images: str,
        names: tuple[str, ...],
        target: Target,
    ) -> "About":
        losses = {ratio: result.loss.item() for ratio, result in results.items()}
        return cls(weights, step, images, names, losses, NOTES[target])

    def file(self, ratio: str) -> str:
        return f"ratio-{ratio}.png"


def columns(result: Reconstruction) -> list[UInt8[np.ndarray, "b h w 3"]]:
    """The four pictures of each image, in the order of `COLUMNS`."""
    pictures = result.original, result.masked, result.reconstructed, result.reconstructed_with_visible
    return [(255 * images).round().byte().permute(0, 2, 3, 1).numpy() for images in pictures]


def sheet(result: Reconstruction) -> UInt8[np.ndarray, "h w 4"]:
    """RGBA: a row an image, a column each of `COLUMNS`."""
    rows, height, width, _ = columns(result)[0].shape
    step_down, step_right = height + _GAP, width + _GAP
    drawn = np.zeros((rows * step_down - _GAP, len(COLUMNS) * step_right - _GAP, 4), np.uint8)
    for column, images in enumerate(columns(result)):
        for row, image in enumerate(images):
            place = drawn[row * step_down :, column * step_right :][:height, :width]
            place[:, :, :3], place[:, :, 3] = image, 255
    return drawn


def write_pictures(folder: Path, results: dict[str, Reconstruction], about: About) -> None:
    """The sheets of `results`, by ratio, in place of what `folder` held."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").unlink(missing_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for ratio, result in results.items():
        with written_whole(folder / about.file(ratio)) as file:
            Image.fromarray(sheet(result)).save(file, "PNG")
    with written_whole(folder / "about.json") as file:
        file.write(json.dumps(asdict(about)).encode() + b"\n")


def read_about(folder: Path) -> About | None:
    """None where the pictures are not whole, or of another version."""
    try:
        return TypeAdapter(About).validate_json((folder / "about.json").read_bytes())
    except (OSError, ValueError):
        return None


def draw_grid(results: dict[str, Reconstruction], about: About, path: Path) -> None:
    """Writes one picture of all ratios: the original, then three columns a ratio; the format is the suffix's."""
    rows = len(about.names)
    width, height = 1 + 3 * len(results), rows + 0.55  # in pictures
    figure = Figure(figsize=(1.5 * width, 1.5 * height))
    axes = figure.subplots(rows, width, squeeze=False)
    for number, (ratio, result) in enumerate(results.items()):
        original, *others = columns(result)
        first = 1 + 3 * number
        for column, (title, images) in enumerate(zip(COLUMNS[1:], others, strict=True), first):
            axes[0, column].set_title(title, fontsize=8)
            for row in range(rows):
                axes[row, column].imshow(images[row])
                axes[row, 0].imshow(original[row])
        text = f"{float(ratio):.0%} removed, loss {about.losses[ratio]:.3f}"
        figure.text((first + 1.5) / width, 1 - 0.03 / height, text, ha="center", va="top", fontsize=9, weight="bold")
    axes[0, 0].set_title(COLUMNS[0], fontsize=8)
    for axis in axes.flat:
        axis.axis("off")
    figure.text(0.004, 0.03 / height, f"{about.weights}.  {about.note}", fontsize=7, va="bottom")
    figure.subplots_adjust(0.003, 0.18 / height, 0.997, 1 - 0.37 / height, wspace=0.03, hspace=0.03)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
