"""The images of a recipe on one process, in its order and with its augmentation: for what is fitted before training."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from maelstream.jobs.recipe import Recipe, RecipeError, load_recipe
from maelstream.jobs.training.data import loader_of
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.order import SampleOrder
from maelstream.shards.dataset import Dataset


def recipe_with(path: Path | None, **model: object) -> Recipe:
    """The recipe of `path`, or the paper's, with what is not None of `model` in place of its values."""
    recipe = Recipe() if path is None else load_recipe(path)
    given: dict = {name: value for name, value in model.items() if value is not None}
    try:
        return replace(recipe, model=replace(recipe.model, **given))
    except ValueError as error:
        raise RecipeError(str(error)) from None


@contextlib.contextmanager
def image_stream(
    dataset: Dataset, recipe: Recipe, batch_size: int, threads: int
) -> Iterator[Iterator[UInt8[Tensor, "b 3 h w"]]]:
    """Batches without end from the recipe's first step on, as `maelstream pretrain` would see them, on
    `recipe.loader.decode.device`.

    Raises:
        RecipeError: a model of other than 3 channels.
    """
    if recipe.model.in_chans != 3:
        raise RecipeError(f"model.in_chans {recipe.model.in_chans}: images are decoded to 3 channels")
    order = SampleOrder(len(dataset), recipe.seed, recipe.data.shuffle)
    with loader_of(recipe, dataset, order, BatchSplit(batch_size, 1, 1), 0, threads) as loader:
        yield (batch.images for batch in loader)
