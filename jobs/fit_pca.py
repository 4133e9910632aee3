"""`maelstream fit-pca DST --out FILE`: the components of the target "pca", from a dataset's patches (table 1d)."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from maelstream.jobs.arguments import parsed
from maelstream.jobs.recipe import RecipeError
from maelstream.jobs.training.image_stream import image_stream, recipe_with
from maelstream.jobs.weights.target_file import TargetFile
from maelstream.model.patches import patchify
from maelstream.model.pca import PatchMoments, PrincipalComponents, principal_components
from maelstream.pipeline.decode import decode_device
from maelstream.shards.dataset import Dataset

_BATCH = 64  # nothing depends on it


@dataclass(frozen=True)
class FitPca:
    """Fit the components of the target "pca" on patches as pre-training would see them."""

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """A packed dataset; a folder, or a URI such as s3://bucket/folder."""
    out: Path
    """The file to write: FILE.safetensors."""
    recipe: Path | None = None
    """Take crop, shuffle, seed, sizes, mean and std from a recipe; the paper's pre-training if not given."""
    components: int | None = None
    """How many of the largest; the recipe's (96) if not given."""
    patch_size: int | None = None
    """Pixels of a side; the recipe's (16) if not given."""
    image_size: int | None = None
    """Pixels of a side; the recipe's (224) if not given."""
    images: int = 50_000
    """How many images to take patches of, at most the whole dataset."""
    threads: int = len(os.sched_getaffinity(0))
    """Threads that decode."""


def fit(command: FitPca) -> tuple[TargetFile, PrincipalComponents]:
    """The same components, to the last bit, however many threads decode."""
    dataset = Dataset.open(command.dst)
    side = command.image_size
    recipe = recipe_with(
        command.recipe,
        target="pca",
        components=command.components,
        patch_size=command.patch_size,
        image_size=None if side is None else (side, side),
    )
    config, count, batch = recipe.model, min(command.images, len(dataset)), min(_BATCH, len(dataset))
    moments = PatchMoments(config.patch_dim, decode_device(recipe.loader.decode))
    with image_stream(dataset, recipe, batch, command.threads) as batches:
        for start in track(range(0, count, batch), "patches", console=Console(stderr=True)):
            moments.add(patchify(next(batches)[: count - start], config.patch_size))
    try:
        found = principal_components(moments, config.components, config.mean, config.std)
    except ValueError as error:
        raise RecipeError(f"--images {command.images}: {error}") from None
    tensors = {"components": found.components, "mean": found.mean, "variances": found.variances}
    settings = {
        "kind": "pca",
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "mean": config.mean,
        "std": config.std,
        "image_size": config.image_size,
        "dataset": dataset.fingerprint,
        "images": count,
    }
    return TargetFile(command.out, {name: tensor.float() for name, tensor in tensors.items()}, settings), found


def main(args: list[str]) -> int:
    """`maelstream fit-pca`."""
    command = parsed(FitPca, args, "fit-pca")
    if command.images < 1 or command.threads < 1:
        raise RecipeError(f"--images {command.images} and --threads {command.threads} must be at least 1")
    if command.out.suffix != ".safetensors":
        raise RecipeError(f"--out {command.out}: the file's name ends in .safetensors")
    file, found = fit(command)
    file.write(command.out)
    shares = found.variances / found.variances.sum()
    table = Table("components", "explained variance", title=f"patches of {file.settings['images']:,} images")
    count = len(found.components)
    for first in sorted({number for number in (1, 3, 10, 30, count) if number <= count}):
        table.add_row(str(first), f"{shares[:first].sum():.2%}")
    console = Console()
    console.print(table)
    console.print(f"{command.out}: {count} components of {len(shares)}", soft_wrap=True)
    return 0
