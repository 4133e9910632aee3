"""What a recipe trains on, opened: a packed dataset, a mix of several, or a stream that is read through."""

from jobs.recipe import DataConfig
from pipeline.mix import Mix, MixOrder
from pipeline.order import SampleOrder
from pipeline.stream import Stream
from shards.dataset import Dataset
from shards.errors import MaelstreamError


def open_data(config: DataConfig, seed: int) -> tuple[Dataset | Mix | Stream, SampleOrder | MixOrder]:
    """The data and the order of its samples; of a stream, the order of its shards.

    Raises:
        MaelstreamError: nothing there, no sound weights, a stream whose length is not told.
    """
    if config.stream.urls:
        stream = config.stream.opened()
        if config.shuffle == "block":
            raise MaelstreamError("a stream cannot be shuffled by blocks; its shards are shuffled, and a buffer is")
        return stream, SampleOrder(len(stream.shards), seed, config.shuffle)
    if config.mix:
        mix = Mix.open(config.mix)
        return mix, MixOrder(mix, seed, config.shuffle)
    dataset = Dataset.open(config.dataset)
    return dataset, SampleOrder(len(dataset), seed, config.shuffle)
