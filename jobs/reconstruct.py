"""`maelstream reconstruct RUN`: how the model fills in images whose patches were mostly removed (paper, figure 4).

In place of a run it takes weights with a decoder, such as a published full checkpoint.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from maelstream.jobs.arguments import check_picture_file, make_folder, parse_arguments
from maelstream.jobs.recipe import Recipe
from maelstream.jobs.reporting.reconstruction_files import ReconstructionInfo, draw_grid, write_reconstructions
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.model.config import MAEConfig
from maelstream.shards.dataset import Dataset
from maelstream.shards.durable import can_write
from maelstream.shards.errors import MaelstreamError

if TYPE_CHECKING:  # torch and DALI take seconds to import, and the options are checked without them
    from maelstream.jobs.reporting.reconstruction import InputImages
    from maelstream.model.mae import Reconstruction


@dataclass(frozen=True)
class Reconstruct:
    """Write original, masked and reconstructed images at several mask ratios as PNGs in RUN/reconstructions/."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The folder of a run; or weights with a decoder: a `.pth`, a Hugging Face folder, an export. Without a run, give
    --images or --dataset; the PNGs go to runs/reconstruct-NAME/."""
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
    norm_pix: bool = False
    """For weights without a run: the decoder predicts normalised pixels. A Hugging Face folder and an export store it;
    for other files plain pixels are assumed, which the published mae_visualize_* predict."""
    heads: int | None = None
    """For weights without a run: attention heads of the encoder, if not stored; dim / 64 if not given."""
    decoder_heads: int | None = None
    """For weights without a run: attention heads of the decoder, if not stored; dim / 32 if not given."""


def ratios_from(text: str | None, config: MAEConfig) -> list[float]:
    """Parses --ratios, ascending; MaelstreamError for text that is no list of ratios that the model can have."""
    if text is None:
        from maelstream.jobs.reporting.reconstruction import possible_ratios

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
    if command.images is not None and command.dataset is not None:
        raise MaelstreamError("--images and --dataset both name images to reconstruct; give one")
    if command.out is not None:
        make_folder("--out", command.out)
        check_picture_file("--out", command.out)
    if folder.config.exists():
        return _reconstruct_run(command, folder)
    return _reconstruct_weights(command)


def _reconstruct_run(command: Reconstruct, folder: RunFolder) -> int:
    if command.norm_pix or command.heads or command.decoder_heads:
        raise MaelstreamError(f"{command.run} is a run, which stores its heads and target; leave out these options")
    recipe = folder.recipe()
    ratios = ratios_from(command.ratios, recipe.model)
    weights = command.weights or folder.checkpoints.at(folder.last_step())
    from maelstream.jobs.reporting.reconstruction import check_shows_pixels, reconstruct, trained_model

    check_shows_pixels(recipe, folder)
    inputs = _inputs(command, recipe)
    results = reconstruct(trained_model(folder, weights), inputs, ratios)
    name = _name(weights)
    out = folder.reconstructions
    if not can_write(out):  # another user's run
        out = Path("runs") / f"reconstruct-{_name(folder.path)}"
    out /= f"{name}-{_source_name(inputs)}"  # the folder `name` is the run's own, of the same images at every step
    info = ReconstructionInfo.describe(
        results, name, folder.checkpoints.step_of(weights), inputs.source, inputs.names, recipe.model.target
    )
    return _write(command, results, info, out)


def _reconstruct_weights(command: Reconstruct) -> int:
    """Weights without a run: sizes from their shapes, masks as in the first epoch of a run with seed 0."""
    if command.weights is not None:
        raise MaelstreamError(f"{command.run} is not a run: it has no config.yaml; give --weights alone, in its place")
    if not command.run.exists():
        raise MaelstreamError(f"{command.run} cannot be read (No such file or directory); give a run or a file")
    from maelstream.jobs.reporting.reconstruction import reconstruct
    from maelstream.jobs.weights.reading import read_weights
    from maelstream.jobs.weights.stored_mae import stored_mae
    from maelstream.jobs.weights.tensor_files import FOLDER_NAMES

    if command.run.is_dir() and not any((command.run / name).exists() for name in FOLDER_NAMES):
        raise MaelstreamError(
            f"{command.run} is not a run: it has no config.yaml; nor has it weights: give a run, or a file of weights"
        )
    stored = read_weights(command.run)
    model = stored_mae(stored, command.heads, command.decoder_heads, command.norm_pix)
    if command.images is None and command.dataset is None:
        raise MaelstreamError(f"{command.run} is not a run, so it has no images; give --images or --dataset")
    recipe = Recipe(model=model.config)
    inputs = _inputs(command, recipe)
    results = reconstruct(model, inputs, ratios_from(command.ratios, model.config))
    name = _name(command.run)
    info = ReconstructionInfo.describe(results, name, None, inputs.source, inputs.names, model.config.target)
    return _write(command, results, info, Path("runs") / f"reconstruct-{name}-{_source_name(inputs)}")


def _name(weights: Path) -> str:
    return weights.stem if weights.is_file() else weights.absolute().name


def _source_name(inputs: "InputImages") -> str:
    return Path(inputs.source).absolute().name


def _inputs(command: Reconstruct, recipe: Recipe) -> "InputImages":
    from maelstream.jobs.reporting.reconstruction import dataset_images, folder_images, run_dataset

    if command.images is not None:
        return folder_images(command.images, command.count, recipe)
    return dataset_images(
        Dataset.open(command.dataset or run_dataset(recipe, RunFolder(command.run))), command.count, recipe
    )


def _write(command: Reconstruct, results: "dict[str, Reconstruction]", info: ReconstructionInfo, out: Path) -> int:
    """Writes one picture to --out, or all files to the folder `out`."""
    if command.out is not None:
        out = command.out
        draw_grid(results, info, out)
    else:
        write_reconstructions(out, results, info)
        draw_grid(results, info, out / "grid.png")
    losses = ", ".join(f"{loss:.4f} at {float(ratio):.0%}" for ratio, loss in info.losses.items())
    print(f"{out}: {len(info.names)} images of {info.images}, {info.weights}, loss on removed patches {losses}")
    return 0
