"""`maelstream fit-pca DST --out FILE`: principal components of patches, for the target "pca" (paper, table 1d)."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from maelstream.jobs.arguments import check_output_file, parse_arguments
from maelstream.jobs.recipe import RecipeError
from maelstream.shards.dataset import Dataset


@dataclass(frozen=True)
class FitPca:
    """Fit the components of the target "pca" on the patches that pre-training would see."""

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """A packed dataset; a folder, or a URI such as s3://bucket/folder."""
    out: Path
    """The file to write: FILE.safetensors."""
    recipe: Path | None = None
    """Recipe with crop, shuffle, seed, sizes, mean and std; default: the paper's pre-training."""
    components: int | None = None
    """Number of components; default: that of the recipe (96)."""
    patch_size: int | None = None
    """Side of a patch in pixels; default: that of the recipe (16)."""
    image_size: int | None = None
    """Side of an image in pixels; default: that of the recipe (224)."""
    images: int = 50_000
    """Number of images to use, at most the whole dataset."""
    threads: int = len(os.sched_getaffinity(0))
    """Number of threads that decode images."""


def main(args: list[str]) -> int:
    """`maelstream fit-pca`."""
    command = parse_arguments(FitPca, args, "fit-pca")
    if command.images < 1 or command.threads < 1:
        raise RecipeError(f"--images {command.images} and --threads {command.threads} must be at least 1")
    if command.out.suffix != ".safetensors":
        raise RecipeError(f"--out {command.out}: the file name must end in .safetensors")
    check_output_file("--out", command.out)
    dataset = Dataset.open(command.dst)
    from maelstream.jobs.training.image_stream import recipe_with  # imports torch and DALI
    from maelstream.jobs.weights.pca_fitting import fit

    side = command.image_size
    recipe = recipe_with(
        command.recipe,
        target="pca",
        components=command.components,
        patch_size=command.patch_size,
        image_size=None if side is None else (side, side),
    )
    file, found = fit(dataset, recipe, command.images, command.threads, command.out)
    file.write(command.out)
    shares = found.variances / found.variances.sum()
    table = Table("components", "explained variance", title=f"patches of {file.settings['images']:,} images")
    count = len(found.components)
    for first in sorted({number for number in (1, 3, 10, 30, count) if number <= count}):
        table.add_row(str(first), f"{shares[:first].sum():.2%}")
    console = Console(markup=False, emoji=False)
    console.print(table)
    console.print(f"{command.out}: {count} components of {len(shares)}", soft_wrap=True)
    return 0
