"""`maelstream reconstruct RUN`: what the model makes of images whose patches were mostly removed (paper, figure 4)."""

import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Annotated

import numpy as np
import torch
import tyro
from jaxtyping import Int64, UInt8
from torch import Tensor

from maelstream.jobs.arguments import parsed
from maelstream.jobs.recipe import Recipe
from maelstream.jobs.reporting.pictures import About, draw_grid, write_pictures
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.reading import mae_weights, read_weights
from maelstream.jobs.weights.target_file import target_of_run
from maelstream.model.mae import MAE, MAEConfig, Reconstruction
from maelstream.pipeline.augment_params import AugmentSampler, CropConfig
from maelstream.pipeline.decode import CpuDecoder, EncodedBatch
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError
from maelstream.shards.inspect import Unfit, inspect
from maelstream.shards.reader import ShardReader

RATIOS = (0.75, 0.85, 0.95)
"""Figure 4's."""


@dataclass(frozen=True)
class Reconstruct:
    """Original, masked and reconstructed images at several mask ratios, as PNGs in RUN/reconstructions/."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run's folder."""
    images: Path | None = None
    """A folder of image files (JPEG, PNG, WebP, BMP) to take; they are looked for in folders below it, too."""
    dataset: str | None = None
    """Or a packed dataset; the run's own if neither is given."""
    count: int = 8
    """Number of images, evenly spaced in what there is."""
    ratios: str | None = None
    """Shares of patches to remove: 0.75,0.85,0.95; if not given these and the recipe's, as far as the model has
    patches enough. Masks of one image are nested: a larger ratio hides more of the same."""
    weights: Path | None = None
    """Other weights for the run's model, with a decoder: an older checkpoint, an export, a folder of Hugging Face's, a
    `.pth`."""
    out: Path | None = None
    """Write all into one FILE.png instead."""


@dataclass(frozen=True)
class Shown:
    """Images and the keys of their masks."""

    source: str
    names: tuple[str, ...]
    images: UInt8[Tensor, "b 3 h w"]
    keys: Int64[Tensor, "b"]


def trained_model(folder: RunFolder, weights: Path) -> MAE:
    """The run's float32 model with the weights of a checkpoint, or of others of its size, on the CPU."""
    recipe = folder.recipe()
    config, target_file = recipe.model, target_of_run(recipe, folder)
    with torch.device("meta"):  # nothing is drawn that would be overwritten
        model = MAE(config)
    model.load_state_dict(mae_weights(read_weights(weights), config), assign=True)
    if target_file is not None:
        model.target = target_file.target(config)
    return model.float().eval()


def possible_ratios(config: MAEConfig) -> list[float]:
    """Those of figure 4 and the recipe's that leave some patches visible and some not; smallest first."""

    def possible(ratio: float) -> bool:
        try:
            return replace(config, mask_ratio=ratio).keep < config.num_patches
        except ValueError:
            return False

    return [ratio for ratio in sorted({config.mask_ratio, *RATIOS}) if possible(ratio)]


def reconstructions(model: MAE, shown: Shown, ratios: list[float]) -> dict[str, Reconstruction]:
    """By ratio, as text; ValueError for a ratio that the model has no mask of."""
    results = {}
    for ratio in ratios:
        masking = copy.copy(model)  # shares the weights
        masking.config = replace(model.config, mask_ratio=ratio)
        results[f"{ratio:g}"] = masking.reconstruct(shown.images, shown.keys)
    return results


def check_reconstructs(recipe: Recipe, folder: RunFolder) -> None:
    """MaelstreamError for a run on tokens that nothing turns into pixels."""
    if (target_file := target_of_run(recipe, folder)) is not None and not target_file.shows_pixels:
        raise MaelstreamError(
            f"{target_file.path}: the tokenizer has no decoder, so the run's tokens cannot be shown as pixels; "
            "`maelstream fit-tokenizer` writes one that has"
        )


def own_dataset(recipe: Recipe) -> str:
    """The dataset to take images of a run from; MaelstreamError for a run that read a stream."""
    if recipe.data.stream.urls:
        raise MaelstreamError(
            "the run read a stream, which has no samples to choose; give --images a folder, or --dataset a packed one"
        )
    return next(iter(recipe.data.mix), recipe.data.dataset)


def packed_images(dataset: Dataset, count: int, recipe: Recipe) -> Shown:
    """Samples that are evenly spaced in the dataset."""
    if not 1 <= count <= len(dataset):
        raise MaelstreamError(f"--count {count}: {dataset.folder} has 1 to {len(dataset)} images to show")
    samples = np.linspace(0, len(dataset) - 1, count).astype(np.int64)
    encoded = ShardReader(dataset, check_crc=True).read(samples)
    names = tuple(map(str, dataset.keys(samples)))
    return _central(dataset.folder, names, encoded, samples, dataset.width[samples], dataset.height[samples], recipe)


def folder_images(folder: Path, count: int, recipe: Recipe) -> Shown:
    """Files that are evenly spaced among a folder's; one that is no sound image is told of and left out.

    Raises:
        MaelstreamError: no folder, or no image in it.
    """
    if not folder.is_dir():
        raise MaelstreamError(f"--images {folder} is not a folder; give one that holds image files")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not files or count < 1:
        raise MaelstreamError(f"--images {folder} --count {count}: there is no image to show")
    chosen = [files[n] for n in np.unique(np.linspace(0, len(files) - 1, min(count, len(files))).astype(int))]
    names, encoded, sizes = [], [], []
    for path in chosen:
        data = path.read_bytes()
        try:
            info = inspect(data)
        except Unfit as reason:
            print(f"maelstream reconstruct: {path} is left out: {reason}", file=sys.stderr)
            continue
        names.append(str(path.relative_to(folder)))
        encoded.append(np.frombuffer(data, np.uint8))
        sizes.append((info.width, info.height))
    if not names:
        raise MaelstreamError(f"--images {folder}: none of {len(chosen)} files is an image that can be shown")
    widths, heights = np.array(sizes, np.uint32).T
    return _central(str(folder), tuple(names), encoded, np.arange(len(names)), widths, heights, recipe)


def _central(
    source: str,
    names: tuple[str, ...],
    encoded: list[np.ndarray],
    samples: Int64[np.ndarray, "b"],
    widths: np.ndarray,
    heights: np.ndarray,
    recipe: Recipe,
) -> Shown:
    """The centre of each image, as large as it gets, under the mask of the run's first epoch."""
    image_size, epoch = recipe.model.image_size, np.zeros_like(samples)
    centre = AugmentSampler(0, CropConfig("none", margin=1), image_size).at(epoch, samples, widths, heights)
    batch = EncodedBatch(encoded, centre.windows, centre.resizes, centre.flips, None)
    decoder = CpuDecoder(lambda _: batch, len(samples), image_size, threads=2, device=torch.device("cpu"))
    keys = AugmentSampler(recipe.seed, recipe.data.crop, image_size).at(epoch, samples, widths, heights).keys
    return Shown(source, names, decoder.run(), torch.from_numpy(keys))


def ratios_of(text: str | None, config: MAEConfig) -> list[float]:
    """The ratios that the command asks for, smallest first."""
    if text is None:
        return possible_ratios(config)
    try:
        ratios = sorted({float(part) for part in text.split(",") if part.strip()})
    except ValueError:
        raise MaelstreamError(f"--ratios {text}: give shares with commas between: 0.75,0.85,0.95") from None
    for ratio in ratios or [0.0]:
        try:
            if replace(config, mask_ratio=ratio).keep == config.num_patches:
                raise ValueError(f"mask_ratio {ratio} of {config.num_patches} patches removes none")
        except ValueError as error:
            raise MaelstreamError(f"--ratios {text}: {error}") from None
    return ratios


def main(args: list[str]) -> int:
    """`maelstream reconstruct`; 0 when the pictures are written."""
    command = parsed(Reconstruct, args, "reconstruct")
    folder = RunFolder(command.run)
    recipe = folder.recipe()
    ratios = ratios_of(command.ratios, recipe.model)
    weights = command.weights or folder.checkpoints.at(folder.last_step())
    name = weights.stem if weights.is_file() else weights.resolve().name
    check_reconstructs(recipe, folder)
    if command.images is not None and command.dataset is not None:
        raise MaelstreamError("--images and --dataset are two places to take images from; give one")
    if command.images is not None:
        shown = folder_images(command.images, command.count, recipe)
    else:
        shown = packed_images(Dataset.open(command.dataset or own_dataset(recipe)), command.count, recipe)
    results = reconstructions(trained_model(folder, weights), shown, ratios)
    about = About.of(results, name, folder.checkpoints.step_of(weights), shown.source, shown.names, recipe.model.target)
    if command.out is not None:
        draw_grid(results, about, command.out)
    else:
        given = command.images or command.dataset
        of_others = "" if given is None else f"-{PurePath(given).name}"
        pictures = folder.reconstructions / f"{name}{of_others}"
        write_pictures(pictures, results, about)
        draw_grid(results, about, pictures / "grid.png")
    losses = ", ".join(f"{loss:.4f} at {float(ratio):.0%}" for ratio, loss in about.losses.items())
    print(
        f"{command.out or pictures}: {len(shown.names)} images of {shown.source}, {name}, loss on removed patches "
        f"{losses}"
    )
    return 0
