"""What every batch contains, known before a byte is read: the endless sequence of samples, split among ranks.

Epochs follow one another, each in its own order. A global batch is the next `batch_size` samples of this sequence, so
every batch is full, a batch may contain samples of two epochs, and each sample comes exactly once per epoch. A batch is
split into `world_size * micro_batches` slices by position alone, so samples, crops and masks are the same on any number
of ranks.

A good sample replaces a bad one. It is drawn from (seed, epoch, position) alone, so every rank and every resumed run
chooses the same one.
"""

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64

from maelstream.pipeline.augment_params import AugmentParams, AugmentSampler
from maelstream.pipeline.hashing import sample_keys, seed_word, uniforms
from maelstream.pipeline.mix import Mix, MixOrder
from maelstream.pipeline.order import SampleOrder
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError

_TRIES = 64

SampleId = tuple[int, int]
"""Epoch and sample number. A sample is bad or good per epoch, because the damage may lie outside of one epoch's crop
window. Whether it is bad then follows from its bytes alone, and not from what was decoded before."""


@dataclass(frozen=True)
class BatchSplit:
    """How a global batch is split: slice `rank * micro_batches + m` is micro-batch `m` of `rank`."""

    batch_size: int
    world_size: int
    micro_batches: int

    def __post_init__(self) -> None:
        if self.world_size * self.micro_batches > self.batch_size:
            raise MaelstreamError(
                f"a batch of {self.batch_size} samples cannot be shared by {self.world_size} ranks with "
                f"{self.micro_batches} micro-batches each; use fewer ranks or a larger batch_size"
            )

    def bounds(self, rank: int, micro_batch: int) -> tuple[int, int]:
        """First position in the global batch and the one after the last; sizes differ by at most 1."""
        number, count = rank * self.micro_batches + micro_batch, self.world_size * self.micro_batches
        return self.batch_size * number // count, self.batch_size * (number + 1) // count

    @property
    def largest(self) -> int:
        """Samples in the largest micro-batch."""
        return -(-self.batch_size // (self.world_size * self.micro_batches))


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one micro-batch, with their labels and augmentation parameters."""

    samples: Int64[np.ndarray, "b"]
    epochs: Int64[np.ndarray, "b"]
    positions: Int64[np.ndarray, "b"]
    """Positions within their epochs."""
    labels: Int32[np.ndarray, "b"]
    augment_params: AugmentParams

    def sample_ids(self) -> list[SampleId]:
        """(epoch, sample) of each sample."""
        return list(zip(self.epochs.tolist(), self.samples.tolist(), strict=True))


@dataclass(frozen=True)
class BatchPlan:
    """The micro-batches of one rank."""

    dataset: Dataset | Mix
    order: SampleOrder | MixOrder
    augment_sampler: AugmentSampler
    batch_split: BatchSplit
    rank: int

    def micro_batch(self, start: int, number: int, bad: Container[SampleId]) -> MicroBatch:
        """Micro-batch `number` of this rank, counted from global position `start`, without samples that are `bad`.

        Raises:
            MaelstreamError: no good sample was found to replace a bad one.
        """
        step, micro_batch = divmod(number, self.batch_split.micro_batches)
        first, end = self.batch_split.bounds(self.rank, micro_batch)
        global_positions = start + step * self.batch_split.batch_size + np.arange(first, end)
        epochs, positions, samples = self.order.lookup(global_positions)
        for index, sample_id in enumerate(zip(epochs.tolist(), samples.tolist(), strict=True)):
            if sample_id in bad:
                samples[index] = self._replacement(*sample_id, int(positions[index]), bad)
        widths, heights = self.dataset.width[samples], self.dataset.height[samples]
        augment_params = self.augment_sampler.at(epochs, samples, widths, heights)
        return MicroBatch(samples, epochs, positions, self.dataset.label[samples], augment_params)

    def owns(self, start: int, global_positions: Int64[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
        """Whether this rank, starting at global position `start`, gets the sample at each of these positions."""
        batch_split = self.batch_split
        count = batch_split.world_size * batch_split.micro_batches
        edges = batch_split.batch_size * np.arange(1, count + 1) // count
        in_batch = (global_positions - start) % batch_split.batch_size
        rank = np.searchsorted(edges, in_batch, "right") // batch_split.micro_batches
        return (rank == self.rank) & (global_positions >= start)

    def _replacement(self, epoch: int, sample: int, position: int, bad: Container[SampleId]) -> int:
        first, end = self.dataset.siblings(sample)
        key = sample_keys(seed_word(self.order.seed, "replace"), np.array([epoch]), np.array([first + position]))
        for other in (first + uniforms(key, _TRIES)[0] * (end - first)).astype(np.int64).tolist():
            if (epoch, other) not in bad:
                return other
        raise MaelstreamError(f"{self.dataset.folder}: {_TRIES} samples drawn, and all are bad; restore the dataset")
