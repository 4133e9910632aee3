"""`maelstream reconstruct RUN`: what the model makes of images whose patches were mostly removed (paper, figure 2)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")  # a file is written; a display is not asked for

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from jaxtyping import Int64, UInt8
from torch import Tensor

from jobs.recipe import Recipe
from jobs.runfolder import RunFolder
from jobs.targetfile import target_of_run
from jobs.weights import mae_weights, read_weights
from model.mae import MAE, Reconstruction
from pipeline.decode import CpuDecoder, EncodedBatch
from pipeline.draws import AugmentDraws, CropConfig
from shards.dataset import Dataset
from shards.errors import MaelstreamError
from shards.reader import ShardReader

COLUMNS = ("original", "masked", "reconstructed", "with visible patches")


@dataclass(frozen=True)
class Reconstruct:
    """Original, masked and reconstructed images of a run, side by side in one PNG."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run's folder."""
    dataset: str | None = None
    """A packed dataset to take images from; the run's own if not given."""
    count: int = 8
    """Number of images, evenly spaced in the dataset."""
    weights: Path | None = None
    """Other weights for the run's model, with a decoder: an export, a folder of Hugging Face's, a `.pth`."""
    out: Path | None = None
    """The PNG; RUN/reconstructions/step-XXXXXXXX.png, or by the name of --weights, if not given."""


def trained_model(folder: RunFolder, weights: Path) -> MAE:
    """The run's float32 model with the weights of a checkpoint, or of others of its size, on the CPU."""
    recipe = folder.recipe()
    config, target_file = recipe.model, target_of_run(recipe, folder)
    model = MAE(config, target=None if target_file is None else target_file.target(config))
    model.load_state_dict(mae_weights(read_weights(weights), config))
    return model.eval()


def central_images(
    dataset: Dataset, samples: Int64[np.ndarray, "b"], image_size: tuple[int, int]
) -> UInt8[Tensor, "b 3 h w"]:
    """The centre of each sample, as large as it gets; nothing is drawn."""
    centre = AugmentDraws(0, CropConfig("none", margin=1), image_size)
    sizes = dataset.width[samples], dataset.height[samples]
    draws = centre.at(np.zeros_like(samples), samples, *sizes)
    encoded = ShardReader(dataset, check_crc=True).read(samples)
    batch = EncodedBatch(encoded, draws.windows, draws.resizes, draws.flips, None)
    decoder = CpuDecoder(lambda _: batch, len(samples), image_size, threads=2, device=torch.device("cpu"))
    return decoder.run()


def draw(result: Reconstruction, recipe: Recipe, name: str, path: Path) -> None:
    """Writes the picture: a row an image, a column each of `COLUMNS`; `name` is that of the weights."""
    pictures = (result.original, result.masked, result.reconstructed, result.reconstructed_with_visible)
    rows = len(result.original)
    figure, axes = plt.subplots(rows, len(COLUMNS), figsize=(2 * len(COLUMNS), 2 * rows + 0.4), squeeze=False)
    for column, (name, images) in enumerate(zip(COLUMNS, pictures, strict=True)):
        axes[0, column].set_title(name, fontsize=9)
        for row in range(rows):
            axes[row, column].imshow(images[row].permute(1, 2, 0).numpy())
            axes[row, column].axis("off")
    figure.text(0.01, 0.004, f"{name}, {recipe.model.mask_ratio:.0%} removed, loss {result.loss:.3f}", fontsize=8)
    figure.tight_layout(pad=0.4, rect=(0, 0.4 / (2 * rows + 0.4) / 2, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: list[str]) -> int:
    """`maelstream reconstruct`; 0 when the picture is written."""
    command = tyro.cli(Reconstruct, args=args, prog="maelstream reconstruct")
    folder = RunFolder(command.run)
    recipe = folder.recipe()
    weights = command.weights or folder.checkpoints.at(folder.last_step())
    name = weights.stem if weights.is_file() else weights.resolve().name
    if recipe.data.stream.urls and command.dataset is None:
        raise MaelstreamError(
            f"{folder.path} read a stream, which has no samples to choose; give --dataset a packed one"
        )
    if (target_file := target_of_run(recipe, folder)) is not None and not target_file.shows_pixels:
        raise MaelstreamError(
            f"{target_file.path}: the tokenizer has no decoder, so the run's tokens cannot be shown as pixels; "
            "`maelstream fit-tokenizer` writes one that has"
        )
    dataset = Dataset.open(command.dataset or next(iter(recipe.data.mix), recipe.data.dataset))
    if not 1 <= command.count <= len(dataset):
        raise MaelstreamError(f"--count {command.count}: {dataset.folder} has 1 to {len(dataset)} images to show")
    samples = np.linspace(0, len(dataset) - 1, command.count).astype(np.int64)
    images = central_images(dataset, samples, recipe.model.image_size)
    widths, heights = dataset.width[samples], dataset.height[samples]
    keys = (
        AugmentDraws(recipe.seed, recipe.data.crop, recipe.model.image_size)
        .at(np.zeros_like(samples), samples, widths, heights)
        .keys
    )
    result = trained_model(folder, weights).reconstruct(images, torch.from_numpy(keys))
    out = command.out or folder.path / "reconstructions" / f"{name}.png"
    draw(result, recipe, name, out)
    print(f"{out}: {command.count} images of {dataset.folder}, {name}, loss on removed patches {result.loss:.4f}")
    return 0
