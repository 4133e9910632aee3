"""`maelstream reconstruct RUN`: how the model fills in images whose patches were mostly removed (paper, figure 4)."""

from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Annotated

import tyro

from maelstream.jobs.arguments import parse_arguments
from maelstream.jobs.reporting.reconstruction import (
    check_shows_pixels,
    dataset_images,
    folder_images,
    possible_ratios,
    reconstruct,
    run_dataset,
    trained_model,
)
from maelstream.jobs.reporting.reconstruction_files import ReconstructionInfo, draw_grid, write_reconstructions
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.model.config import MAEConfig
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError


@dataclass(frozen=True)
class Reconstruct:
    """Write original, masked and reconstructed images at several mask ratios as PNGs in RUN/reconstructions/."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The folder of a run."""
    images: Path | None = None
    """A folder of image files (JPEG, PNG, WebP, BMP) to reconstruct; folders below it are searched, too."""
    dataset: str | None = None
    """A packed dataset to reconstruct; the run's own if neither --images nor --dataset is given."""
    count: int = 8
    """Number of images, evenly spaced in the folder or dataset."""
    ratios: str | None = None
    """Shares of patches to remove, such as 0.75,0.85,0.95. If not given: these three and the recipe's own, without
    those that would leave no patch visible. Masks of one image are nested: a larger ratio hides more of the same."""
    weights: Path | None = None
    """Other weights for the run's model, with a decoder: an older checkpoint, an export, a Hugging Face folder, or a
    `.pth`."""
    out: Path | None = None
    """Write only one picture of all ratios to this FILE.png."""


def ratios_from(text: str | None, config: MAEConfig) -> list[float]:
    """Parses --ratios, ascending; MaelstreamError for text that is no list of ratios that the model can have."""
    if text is None:
        return possible_ratios(config)
    try:
        ratios = sorted({float(part) for part in text.split(",") if part.strip()})
    except ValueError:
        raise MaelstreamError(f"--ratios {text}: give numbers separated by commas, such as 0.75,0.85,0.95") from None
    for ratio in ratios or [0.0]:
        try:
            if replace(config, mask_ratio=ratio).keep == config.num_patches:
                raise ValueError(f"mask_ratio {ratio} of {config.num_patches} patches removes none")
        except ValueError as error:
            raise MaelstreamError(f"--ratios {text}: {error}") from None
    return ratios


def main(args: list[str]) -> int:
    """Runs `maelstream reconstruct`; returns 0 when the pictures are written."""
    command = parse_arguments(Reconstruct, args, "reconstruct")
    folder = RunFolder(command.run)
    recipe = folder.recipe()
    ratios = ratios_from(command.ratios, recipe.model)
    weights = command.weights or folder.checkpoints.at(folder.last_step())
    name = weights.stem if weights.is_file() else weights.resolve().name
    check_shows_pixels(recipe, folder)
    if command.images is not None and command.dataset is not None:
        raise MaelstreamError("--images and --dataset both name images to reconstruct; give one")
    if command.images is not None:
        inputs = folder_images(command.images, command.count, recipe)
    else:
        inputs = dataset_images(Dataset.open(command.dataset or run_dataset(recipe)), command.count, recipe)
    results = reconstruct(trained_model(folder, weights), inputs, ratios)
    step = folder.checkpoints.step_of(weights)
    info = ReconstructionInfo.describe(results, name, step, inputs.source, inputs.names, recipe.model.target)
    if command.out is not None:
        draw_grid(results, info, command.out)
        out = command.out
    else:
        source = command.images or command.dataset
        suffix = "" if source is None else f"-{PurePath(source).name}"
        out = folder.reconstructions / f"{name}{suffix}"
        write_reconstructions(out, results, info)
        draw_grid(results, info, out / "grid.png")
    losses = ", ".join(f"{loss:.4f} at {float(ratio):.0%}" for ratio, loss in info.losses.items())
    print(f"{out}: {len(inputs.names)} images of {inputs.source}, {name}, loss on removed patches {losses}")
    return 0
