"""Long reads for a block shuffle: this rank's share of a window of the order is fetched at once, one window ahead.

Samples of a window lie in a few blocks of consecutive samples, so that fetching its share takes a few long requests,
however its samples are shuffled. At most `_KEPT` windows of a dataset are held, or those that a large micro-batch spans
and one more: of ImageNet 225 MB each, over the number of ranks. The datasets of a mix have windows of their own.
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

Window = tuple[int, int]
"""Epoch and number."""


class BlockReads:
    """Reads micro-batches of a line whose order is a block shuffle; call `close` at the end."""

    def __init__(self, line: BatchPlan, start: int):
        """`start` samples of the line have been consumed, and will not be asked for."""
        dataset, order = line.dataset, line.order
        if isinstance(order, MixOrder):
            self._split = order.mix.split
            self._parts = [
                _Windows(order.of(number), part, partial(_mine_of_mix, line, order, start, number))
                for number, part in enumerate(order.mix.datasets)
            ]
        else:
            assert isinstance(dataset, Dataset)
            self._split = lambda samples: [(np.arange(len(samples)), samples)]
            self._parts = [_Windows(order, dataset, partial(line.mine, start))]

    def read(self, planned: MicroBatch) -> list[np.ndarray]:
        """Encoded bytes of each sample, uint8."""
        found: list[np.ndarray] = [np.empty(0, np.uint8)] * len(planned.samples)
        for part, (places, samples) in zip(self._parts, self._split(planned.samples), strict=True):
            if len(places):
                data = part.read(planned.epochs[places], planned.positions[places], samples)
                for place, item in zip(places.tolist(), data, strict=True):
                    found[place] = item
        return found

    def close(self) -> None:
        for part in self._parts:
            part.close()


def _mine_of_mix(line: BatchPlan, order: MixOrder, start: int, number: int, own: np.ndarray) -> Bool[np.ndarray, "n"]:
    return line.mine(start, order.line_of(number, own))


class _Windows:
    """Those of one dataset."""

    def __init__(
        self,
        order: SampleOrder,
        dataset: Dataset,
        mine: Callable[[Int64[np.ndarray, "n"]], Bool[np.ndarray, "n"]],
    ):
        """`mine` tells which places of the dataset's own line of epochs this rank will ask for."""
        self._order, self._reader, self._mine = order, ShardReader(dataset, check_crc=False), mine
        self._held: dict[Window, Future[dict[int, np.ndarray]]] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(2, "windows")

    def read(self, epochs: np.ndarray, positions: np.ndarray, samples: np.ndarray) -> list[np.ndarray]:
        numbers = self._order.windows(epochs, positions)
        places = list(zip(epochs.tolist(), numbers.tolist(), strict=True))
        windows = sorted(set(places))
        with self._lock:
            held = {window: self._future(window) for window in windows}
            self._future(self._after(windows[-1]))
            while len(self._held) > max(_KEPT, len(windows) + 1):
                del self._held[min(self._held)]
        found = [held[place].result().get(sample) for place, sample in zip(places, samples.tolist(), strict=True)]
        # a bad sample's replacement comes from anywhere
        return [self._reader.read(samples[n : n + 1])[0] if data is None else data for n, data in enumerate(found)]

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _future(self, window: Window) -> Future[dict[int, np.ndarray]]:
        if window not in self._held:
            self._held[window] = self._threads.submit(self._fetch, *window)
        return self._held[window]

    def _after(self, window: Window) -> Window:
        epoch, number = window
        first, end = self._order.window(epoch, number + 1)
        return (epoch, number + 1) if first < end else (epoch + 1, 0)

    def _fetch(self, epoch: int, number: int) -> dict[int, np.ndarray]:
        positions = np.arange(*self._order.window(epoch, number))
        positions = positions[self._mine(epoch * self._order.size + positions)]
        samples = np.sort(self._order.at(np.full_like(positions, epoch), positions))
        return dict(zip(samples.tolist(), self._reader.read(samples), strict=True))
