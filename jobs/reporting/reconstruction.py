"""Reconstructs images with a run's model at several mask ratios (paper, figure 4)."""

import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from maelstream.jobs.recipe import Recipe
from maelstream.jobs.run_folder.data_paths import located
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.reading import mae_weights, read_weights
from maelstream.jobs.weights.target_file import run_target_file
from maelstream.model.config import MAEConfig
from maelstream.model.mae import MAE, Reconstruction
from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.config import CropConfig
from maelstream.pipeline.decode import CpuDecoder, EncodedBatch
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError
from maelstream.shards.inspect import UnusableImageError, inspect
from maelstream.shards.reader import ShardReader

RATIOS = (0.75, 0.85, 0.95)
"""The mask ratios of figure 4."""


@dataclass(frozen=True)
class InputImages:
    """Decoded images with the keys that their masks are drawn from."""

    source: str
    """The dataset or folder that they come from."""
    names: tuple[str, ...]
    images: UInt8[Tensor, "b 3 h w"]
    keys: Int64[Tensor, "b"]


def reconstruct(model: MAE, inputs: InputImages, ratios: list[float]) -> dict[str, Reconstruction]:
    """Reconstructs `inputs` once per ratio; the result's keys are the ratios as text.

    Raises:
        ValueError: a ratio for which the model cannot draw a mask.
    """
    results = {}
    for ratio in ratios:
        masking = copy.copy(model)  # shares the weights
        masking.config = replace(model.config, mask_ratio=ratio)
        results[f"{ratio:g}"] = masking.reconstruct(inputs.images, inputs.keys)
    return results


def possible_ratios(config: MAEConfig) -> list[float]:
    """The ratios of figure 4 and the recipe's own that leave some patches visible and remove some; ascending."""

    def possible(ratio: float) -> bool:
        try:
            return replace(config, mask_ratio=ratio).keep < config.num_patches
        except ValueError:
            return False

    return [ratio for ratio in sorted({config.mask_ratio, *RATIOS}) if possible(ratio)]


def trained_model(folder: RunFolder, weights: Path) -> MAE:
    """The run's model in float32 on the CPU, with the given weights: a checkpoint, or others of the same size.

    Raises:
        WeightsError: weights that cannot be read or do not fit.
    """
    recipe = folder.recipe()
    config, target_file = recipe.model, run_target_file(recipe, folder)
    with torch.device("meta"):  # skips the random initialisation, which would be overwritten
        model = MAE(config)
    model.load_state_dict(mae_weights(read_weights(weights), config), assign=True)
    if target_file is not None:
        model.target = target_file.target(config)
    return model.float().eval()


def check_shows_pixels(recipe: Recipe, folder: RunFolder) -> None:
    """Raises MaelstreamError for a run on tokens whose tokenizer has no decoder to pixels."""
    if (target_file := run_target_file(recipe, folder)) is not None and not target_file.shows_pixels:
        raise MaelstreamError(
            f"{target_file.path}: the tokenizer has no decoder, so the run's tokens cannot be shown as pixels; "
            "`maelstream fit-tokenizer` trains one that has"
        )


def run_dataset(recipe: Recipe, folder: RunFolder) -> str:
    """The dataset that a run trains on, the first one of a mix.

    Raises:
        MaelstreamError: the run reads a stream, or the dataset is not where the run found it.
    """
    if recipe.data.stream.urls:
        raise MaelstreamError(
            "the run reads a stream, from which no samples can be chosen; give --images a folder, or --dataset a "
            "packed dataset"
        )
    path = next(iter(recipe.data.mix), recipe.data.dataset)
    if (found := located(folder, path)) is None:
        raise MaelstreamError(
            f"{folder.path} was trained on {path}, which is neither below the folder that it was started in, nor below "
            "this one, nor next to the run; give its new place with --dataset"
        )
    return found


def dataset_images(dataset: Dataset, count: int, recipe: Recipe) -> InputImages:
    """Reads `count` evenly spaced samples of a dataset; MaelstreamError when it has fewer."""
    if not 1 <= count <= len(dataset):
        raise MaelstreamError(f"--count {count}: give 1 to {len(dataset)}, the number of images in {dataset.folder}")
    samples = np.linspace(0, len(dataset) - 1, count).astype(np.int64)
    encoded = ShardReader(dataset, check_crc=True).read(samples)
    names = tuple(map(str, dataset.keys(samples)))
    return _centre_crops(
        dataset.folder, names, encoded, samples, dataset.width[samples], dataset.height[samples], recipe
    )


def folder_images(folder: Path, count: int, recipe: Recipe) -> InputImages:
    """Reads `count` evenly spaced files below a folder; files that are not sound images are reported and left out.

    Raises:
        MaelstreamError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise MaelstreamError(f"--images {folder} is not a folder; give one that holds image files")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not files or count < 1:
        raise MaelstreamError(f"--images {folder} --count {count}: there is no image to reconstruct")
    chosen = [files[n] for n in np.unique(np.linspace(0, len(files) - 1, min(count, len(files))).astype(int))]
    names, encoded, sizes = [], [], []
    for path in chosen:
        data = path.read_bytes()
        try:
            info = inspect(data)
        except UnusableImageError as reason:
            print(f"maelstream reconstruct: {path} is left out: {reason}", file=sys.stderr)
            continue
        names.append(str(path.relative_to(folder)))
        encoded.append(np.frombuffer(data, np.uint8))
        sizes.append((info.width, info.height))
    if not names:
        raise MaelstreamError(f"--images {folder}: none of {len(chosen)} files is an image that can be decoded")
    widths, heights = np.array(sizes, np.uint32).T
    return _centre_crops(str(folder), tuple(names), encoded, np.arange(len(names)), widths, heights, recipe)


def _centre_crops(
    source: str,
    names: tuple[str, ...],
    encoded: list[np.ndarray],
    samples: Int64[np.ndarray, "b"],
    widths: np.ndarray,
    heights: np.ndarray,
    recipe: Recipe,
) -> InputImages:
    """Decodes the largest centre crop of each image; the masks are those of the run's first epoch."""
    image_size, epoch = recipe.model.image_size, np.zeros_like(samples)
    centre = AugmentSampler(0, CropConfig("none", margin=1), image_size).at(epoch, samples, widths, heights)

    def image(number: int) -> EncodedBatch:
        number = min(number, len(samples) - 1)  # DALI asks for more
        one = slice(number, number + 1)
        return EncodedBatch(encoded[one], centre.windows[one], centre.resizes[one], centre.flips[one], None)

    # One image at a time: a batch would hold all stored pixels of all images.
    decoder = CpuDecoder(image, 1, image_size, threads=2, device=torch.device("cpu"), ahead=1)
    images = torch.cat([decoder.run() for _ in samples])
    keys = AugmentSampler(recipe.seed, recipe.data.crop, image_size).at(epoch, samples, widths, heights).keys
    return InputImages(source, names, images, torch.from_numpy(keys))
