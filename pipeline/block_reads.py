"""Long reads for a block shuffle: this rank's share of a superblock is fetched at once, one superblock ahead.

The samples of a superblock lie in a few blocks of consecutive samples. Fetching a rank's share takes a few long
requests, in whichever order the samples come. At most `_KEPT` superblocks per dataset stay in memory, or one more than
a large micro-batch spans. One superblock of ImageNet has 225 MB, divided by the number of ranks. Each dataset of a mix
has its own superblocks.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
from jaxtyping import Bool, Int64

from maelstream.pipeline.batch_plan import BatchPlan, MicroBatch
from maelstream.pipeline.mix import MixOrder
from maelstream.pipeline.order import SampleOrder
from maelstream.shards.dataset import Dataset
from maelstream.shards.reader import ShardReader

_KEPT = 3

SuperblockId = tuple[int, int]
"""Epoch and number of the superblock in it."""


class BlockReads:
    """Reads the micro-batches of a plan whose order is a block shuffle; call `close` at the end."""

    def __init__(self, plan: BatchPlan, start: int):
        """`start` is the first global position; `read` never needs samples before it."""
        dataset, order = plan.dataset, plan.order
        if isinstance(order, MixOrder):
            self._split = order.mix.split
            self._parts = [
                _DatasetReads(order.dataset_order(number), part, partial(_owns_in_mix, plan, order, start, number))
                for number, part in enumerate(order.mix.datasets)
            ]
        else:
            assert isinstance(dataset, Dataset)
            self._split = lambda samples: [(np.arange(len(samples)), samples)]
            self._parts = [_DatasetReads(order, dataset, partial(plan.owns, start))]

    def read(self, micro_batch: MicroBatch) -> list[np.ndarray]:
        """Encoded bytes of each sample, uint8."""
        found: list[np.ndarray] = [np.empty(0, np.uint8)] * len(micro_batch.samples)
        for part, (indices, samples) in zip(self._parts, self._split(micro_batch.samples), strict=True):
            if len(indices):
                encoded = part.read(micro_batch.epochs[indices], micro_batch.positions[indices], samples)
                for index, data in zip(indices.tolist(), encoded, strict=True):
                    found[index] = data
        return found

    def close(self) -> None:
        """Stops the threads that fetch."""
        for part in self._parts:
            part.close()


def _owns_in_mix(
    plan: BatchPlan, order: MixOrder, start: int, number: int, dataset_positions: np.ndarray
) -> Bool[np.ndarray, "n"]:
    return plan.owns(start, order.mix_positions(number, dataset_positions))


class _DatasetReads:
    """Fetches and keeps the superblocks of one dataset."""

    def __init__(
        self,
        order: SampleOrder,
        dataset: Dataset,
        owns: Callable[[Int64[np.ndarray, "n"]], Bool[np.ndarray, "n"]],
    ):
        """`owns` says which global positions of the dataset this rank will read."""
        self._order, self._reader, self._owns = order, ShardReader(dataset, check_crc=False), owns
        self._kept: dict[SuperblockId, Future[dict[int, np.ndarray]]] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(2, "superblocks")

    def read(self, epochs: np.ndarray, positions: np.ndarray, samples: np.ndarray) -> list[np.ndarray]:
        numbers = self._order.superblocks(epochs, positions)
        superblock_of_each = list(zip(epochs.tolist(), numbers.tolist(), strict=True))
        superblocks = sorted(set(superblock_of_each))
        with self._lock:
            futures = {superblock: self._future(superblock) for superblock in superblocks}
            self._future(self._next(superblocks[-1]))
            while len(self._kept) > max(_KEPT, len(superblocks) + 1):
                del self._kept[min(self._kept)]
        found = [
            futures[superblock].result().get(sample)
            for superblock, sample in zip(superblock_of_each, samples.tolist(), strict=True)
        ]
        # A sample that replaces a bad one may be in any superblock, so it is read by itself.
        return [self._reader.read(samples[n : n + 1])[0] if data is None else data for n, data in enumerate(found)]

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _future(self, superblock: SuperblockId) -> Future[dict[int, np.ndarray]]:
        if superblock not in self._kept:
            self._kept[superblock] = self._threads.submit(self._fetch, *superblock)
        return self._kept[superblock]

    def _next(self, superblock: SuperblockId) -> SuperblockId:
        epoch, number = superblock
        first, end = self._order.superblock_bounds(epoch, number + 1)
        return (epoch, number + 1) if first < end else (epoch + 1, 0)

    def _fetch(self, epoch: int, number: int) -> dict[int, np.ndarray]:
        positions = np.arange(*self._order.superblock_bounds(epoch, number))
        positions = positions[self._owns(epoch * self._order.size + positions)]
        samples = np.sort(self._order.at(np.full_like(positions, epoch), positions))
        return dict(zip(samples.tolist(), self._reader.read(samples), strict=True))
