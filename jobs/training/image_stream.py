"""Images of a recipe on one process, in its order and with its augmentation, to fit a target before training."""

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
    """The recipe of `path`, or the paper's pre-training, with those `model` values that are not None.

    Raises:
        RecipeError: the recipe cannot be read, or the values are invalid.
    """
    recipe = Recipe() if path is None else load_recipe(path)
    changed: dict = {name: value for name, value in model.items() if value is not None}
    try:
        return replace(recipe, model=replace(recipe.model, **changed))
    except ValueError as error:
        raise RecipeError(str(error)) from None


@contextlib.contextmanager
def image_stream(
    dataset: Dataset, recipe: Recipe, batch_size: int, threads: int
) -> Iterator[Iterator[UInt8[Tensor, "b 3 h w"]]]:
    """An endless iterator of batches, from the recipe's first step, as `maelstream pretrain` would see them.

    The images are on `recipe.loader.decode.device`.

    Raises:
        RecipeError: the model does not have 3 channels.
    """
    if recipe.model.in_chans != 3:
        raise RecipeError(f"model.in_chans {recipe.model.in_chans}: images are decoded to 3 channels")
    order = SampleOrder(len(dataset), recipe.seed, recipe.data.shuffle)
    with loader_of(recipe, dataset, order, BatchSplit(batch_size, 1, 1), 0, threads) as loader:
        yield (batch.images for batch in loader)
