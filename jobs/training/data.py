"""Opens the data of a recipe (a packed dataset, a mix of datasets, or a stream) and builds its loader."""

import math
from collections.abc import Callable
from dataclasses import replace

from maelstream.jobs.recipe import AnyRecipe, DataConfig, Recipe
from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.loader import ImageLoader
from maelstream.pipeline.mix import Mix, MixOrder
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.sample_source import BadSample
from maelstream.pipeline.stream import Stream
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError


def open_data(config: DataConfig, seed: int) -> tuple[Dataset | Mix | Stream, SampleOrder | MixOrder]:
    """Opens the data and the order of its samples; for a stream, the order of its shards.

    Raises:
        MaelstreamError: there is no dataset, the weights of a mix are invalid, or a stream's length is missing.
    """
    if config.stream.urls:
        stream = Stream(config.stream.urls, config.stream.samples, config.stream.shuffle_buffer)
        if config.shuffle == "block":
            raise MaelstreamError("a stream cannot be shuffled by blocks; it shuffles shards and a buffer")
        return stream, SampleOrder(len(stream.shards), seed, config.shuffle)
    if config.mix:
        mix = Mix.open(config.mix)
        return mix, MixOrder(mix, seed, config.shuffle)
    dataset = Dataset.open(config.dataset)
    return dataset, SampleOrder(len(dataset), seed, config.shuffle)


def batch_split_of(recipe: AnyRecipe, world_size: int) -> BatchSplit:
    """Splits the global batch into the fewest micro-batches of at most `engine.micro_batch_size`, equally per rank."""
    share = math.ceil(recipe.optim.batch_size / world_size)
    return BatchSplit(recipe.optim.batch_size, world_size, math.ceil(share / recipe.engine.micro_batch_size))


def loader_of(
    recipe: Recipe,
    dataset: Dataset | Mix | Stream,
    order: SampleOrder | MixOrder,
    batch_split: BatchSplit,
    rank: int,
    threads: int,
    on_bad: Callable[[BadSample], None] = lambda _: None,
) -> ImageLoader:
    """Builds the loader with the augmentation and settings of a recipe."""
    return ImageLoader(
        dataset,
        order,
        AugmentSampler(recipe.seed, recipe.data.crop, recipe.model.image_size),
        batch_split,
        rank,
        replace(recipe.loader, threads=threads),
        on_bad=on_bad,
    )
