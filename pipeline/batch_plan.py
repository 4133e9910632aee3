"""The endless line of samples, and how ranks cut it: what every batch holds, known before a byte is read.

Epochs follow one another, each in an order of its own; a global batch is the next `batch_size` of the line, so every
batch is full, a batch may span two epochs, and each sample comes exactly once an epoch. A batch is cut into
`world_size * micro_batches` slices by position alone: the same samples, crops and masks on any number of ranks.

A bad sample's place is taken by a good one that is drawn from (seed, epoch, position) alone, so every rank, and every
resumed run, puts the same one there.
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
"""An epoch and a sample. A damaged image may be good in an epoch whose window passes the damage by, so whether a sample
is bad is told for an epoch: it then follows from the bytes alone, whatever was met before."""


@dataclass(frozen=True)
class BatchSplit:
    """How a global batch is cut: slice `rank * micro_batches + m` is micro-batch `m` of `rank`."""

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
        return -(-self.batch_size // (self.world_size * self.micro_batches))


@dataclass(frozen=True)
class MicroBatch:
    """What a micro-batch holds."""

    samples: Int64[np.ndarray, "b"]
    epochs: Int64[np.ndarray, "b"]
    positions: Int64[np.ndarray, "b"]
    """In the epoch."""
    labels: Int32[np.ndarray, "b"]
    draws: AugmentParams

    def places(self) -> list[SampleId]:
        """Of each sample."""
        return list(zip(self.epochs.tolist(), self.samples.tolist(), strict=True))


@dataclass(frozen=True)
class BatchPlan:
    """The line of `dataset` as one rank sees it."""

    dataset: Dataset | Mix
    order: SampleOrder | MixOrder
    draws: AugmentSampler
    batch_split: BatchSplit
    rank: int

    def at(self, start: int, number: int, bad: Container[SampleId]) -> MicroBatch:
        """Micro-batch `number` of this rank, counted from where `start` samples of the line had been consumed, without
        those that are `bad`."""
        step, micro_batch = divmod(number, self.batch_split.micro_batches)
        first, end = self.batch_split.bounds(self.rank, micro_batch)
        line = start + step * self.batch_split.batch_size + np.arange(first, end)
        epochs, positions, samples = self.order.of_line(line)
        for place, found in enumerate(zip(epochs.tolist(), samples.tolist(), strict=True)):
            if found in bad:
                samples[place] = self._replacement(*found, int(positions[place]), bad)
        widths, heights = self.dataset.width[samples], self.dataset.height[samples]
        draws = self.draws.at(epochs, samples, widths, heights)
        return MicroBatch(samples, epochs, positions, self.dataset.label[samples], draws)

    def mine(self, start: int, line: Int64[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
        """Which places of the line this rank gets, where `start` samples had been consumed."""
        batch_split = self.batch_split
        count = batch_split.world_size * batch_split.micro_batches
        edges = batch_split.batch_size * np.arange(1, count + 1) // count
        rank = np.searchsorted(edges, (line - start) % batch_split.batch_size, "right") // batch_split.micro_batches
        return (rank == self.rank) & (line >= start)

    def _replacement(self, epoch: int, sample: int, position: int, bad: Container[SampleId]) -> int:
        first, end = self.dataset.siblings(sample)
        key = sample_keys(seed_word(self.order.seed, "replace"), np.array([epoch]), np.array([first + position]))
        for other in (first + uniforms(key, _TRIES)[0] * (end - first)).astype(np.int64).tolist():
            if (epoch, other) not in bad:
                return other
        raise MaelstreamError(f"{self.dataset.folder}: of {_TRIES} samples drawn, all were bad; restore the dataset")
