"""Long reads for a block shuffle: this rank's share of a window of the order is fetched at once, one window ahead.

Samples of a window lie in a few blocks of consecutive samples, so that fetching its share takes a few long requests,
however its samples are shuffled. At most `_KEPT` windows are held, or those that a large micro-batch spans and one
more: of ImageNet 225 MB each, over the number of ranks.
"""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from pipeline.line import Line, MicroBatch
from pipeline.order import SampleOrder
from shards.dataset import Dataset
from shards.reader import ShardReader

_KEPT = 3

Window = tuple[int, int]
"""Epoch and number."""


class WindowReader:
    """Reads micro-batches of `line`, whose order is a block shuffle; call `close` at the end."""

    def __init__(self, line: Line, reader: ShardReader, start: int):
        """`start` samples of the line have been consumed, and will not be asked for."""
        assert isinstance(line.order, SampleOrder) and isinstance(line.dataset, Dataset)
        self._order, self._dataset = line.order, line.dataset
        self._line, self._reader, self._start = line, reader, start
        self._held: dict[Window, Future[dict[int, np.ndarray]]] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(2, "windows")

    def read(self, planned: MicroBatch) -> list[np.ndarray]:
        """Encoded bytes of each sample, uint8."""
        numbers = self._order.windows(planned.epochs, planned.positions)
        places = list(zip(planned.epochs.tolist(), numbers.tolist(), strict=True))
        windows = sorted(set(places))
        with self._lock:
            held = {window: self._future(window) for window in windows}
            self._future(self._after(windows[-1]))
            while len(self._held) > max(_KEPT, len(windows) + 1):
                del self._held[min(self._held)]
        found = [
            held[place].result().get(sample) for place, sample in zip(places, planned.samples.tolist(), strict=True)
        ]
        # a bad sample's replacement comes from anywhere
        return [
            self._reader.read(planned.samples[n : n + 1])[0] if data is None else data for n, data in enumerate(found)
        ]

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
        positions = positions[self._line.mine(self._start, epoch * len(self._dataset) + positions)]
        samples = np.sort(self._order.at(np.full_like(positions, epoch), positions))
        return dict(zip(samples.tolist(), self._reader.read(samples), strict=True))
