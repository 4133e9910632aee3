"""One epoch in order: every image of a dataset exactly once over all ranks, with the crop of evaluation.

It is the loader's line, unshuffled and cut as in training, so every rank gets as many micro-batches, all of one size:
with shared-out weights no forward pass may be missing on any rank. What reaches beyond the end of the epoch, and what
stands in for an image that cannot be decoded, is marked as not to be counted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from maelstream.pipeline.augment_params import AugmentSampler, CropConfig
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.decode import DecodeConfig
from maelstream.pipeline.loader import ImageLoader
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.sample_source import BadSample
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError


def evaluation_margin(image_size: tuple[int, int]) -> float:
    """Of the resized image over the crop: 256 / 224 up to 224 px, none beyond (as the reference evaluates)."""
    return 256 / 224 if max(image_size) <= 224 else 1.0


@dataclass(frozen=True)
class Reading:
    """How images are read in order."""

    image_size: tuple[int, int]
    """Height and width of the crop in pixels."""
    margin: float
    """As `CropConfig.margin`."""
    micro_batch_size: int
    """Images that a rank gets at once."""
    threads: int
    """As the loader's; likewise the two below."""
    prefetch: int = 4
    decode: DecodeConfig = DecodeConfig()


@dataclass(frozen=True)
class Portion:
    """A micro-batch of one rank."""

    images: UInt8[Tensor, "b 3 h w"]  # where they were decoded
    samples: Int64[np.ndarray, "b"]
    counts: Bool[np.ndarray, "b"]
    """Whether the image is that of the sample, and comes for the first time."""


def every_image(
    dataset: Dataset, reading: Reading, rank: int, world_size: int, on_bad: Callable[[BadSample], None]
) -> Iterator[Portion]:
    """The portions of `rank`, as many as every other rank's; `on_bad` is told of what cannot be decoded.

    Raises:
        MaelstreamError: fewer images than ranks, or a dataset that cannot be read.
    """
    size = len(dataset)
    if size < world_size:
        raise MaelstreamError(f"{dataset.folder} holds {size} images for {world_size} ranks; start fewer")
    batch_split = BatchSplit(min(size, reading.micro_batch_size * world_size), world_size, 1)
    loader = ImageLoader(
        dataset,
        SampleOrder(size, 0, "none"),
        AugmentSampler(0, CropConfig(kind="none", margin=reading.margin), reading.image_size),
        reading.image_size,
        batch_split,
        rank,
        reading.threads,
        reading.prefetch,
        decode=reading.decode,
        max_bad_share=1.0,  # all of them are told
        on_bad=on_bad,
    )
    with loader:
        batches = iter(loader)
        first, end = batch_split.bounds(rank, 0)
        for start in range(0, size, batch_split.batch_size):
            line = start + np.arange(first, end)
            batch = next(batches)
            yield Portion(batch.images, line % size, (line < size) & (batch.samples == line % size))
