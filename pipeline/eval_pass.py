"""One pass in order: every image of a dataset exactly once over all ranks, with the evaluation crop.

It uses the training loader without a shuffle, so every rank gets equally many micro-batches of one size: with sharded
weights (ZeRO-3), no forward pass may be missing on any rank. Images beyond the end of the epoch, and images that
replace one that cannot be decoded, are marked as not counted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.config import CropConfig, LoaderConfig, evaluation_margin
from maelstream.pipeline.loader import ImageLoader
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.sample_source import BadSample
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError


@dataclass(frozen=True)
class Reading:
    """How an evaluation reads images."""

    image_size: tuple[int, int]
    """Height and width of the crop in pixels."""
    margin: float | None
    """Size of the resized image divided by the size of the crop; None: `evaluation_margin` of the size."""
    micro_batch_size: int
    """Images per rank and forward pass."""
    loader: LoaderConfig = LoaderConfig()
    """`max_bad_share` has no effect: an evaluation reports all bad images."""

    @property
    def crop(self) -> CropConfig:
        """The evaluation crop, with the margin that applies."""
        return CropConfig("none", margin=self.margin or evaluation_margin(self.image_size))


@dataclass(frozen=True)
class EvalBatch:
    """A micro-batch of one rank."""

    images: UInt8[Tensor, "b 3 h w"]  # on the device that decoded them
    samples: Int64[np.ndarray, "b"]
    counted: Bool[np.ndarray, "b"]
    """False for a repeated image, and for the replacement of one that cannot be decoded."""


def every_image(
    dataset: Dataset, reading: Reading, rank: int, world_size: int, on_bad: Callable[[BadSample], None]
) -> Iterator[EvalBatch]:
    """Yields the batches of `rank`, as many as on every other rank; calls `on_bad` once per image that fails.

    Raises:
        MaelstreamError: there are fewer images than ranks, or the dataset cannot be read.
    """
    size = len(dataset)
    if size < world_size:
        raise MaelstreamError(f"{dataset.folder} holds {size} images for {world_size} ranks; start fewer")
    batch_split = BatchSplit(min(size, reading.micro_batch_size * world_size), world_size, 1)
    loader = ImageLoader(
        dataset,
        SampleOrder(size, 0, "none"),
        AugmentSampler(0, reading.crop, reading.image_size),
        batch_split,
        rank,
        replace(reading.loader, max_bad_share=1.0),
        on_bad=on_bad,
    )
    with loader:
        batches = iter(loader)
        first, end = batch_split.bounds(rank, 0)
        for start in range(0, size, batch_split.batch_size):
            positions = start + np.arange(first, end)
            batch = next(batches)
            samples = positions % size
            yield EvalBatch(batch.images, samples, (positions < size) & (batch.samples == samples))
