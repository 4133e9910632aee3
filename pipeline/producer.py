"""The thread behind an image loader: reads ahead, decodes, replaces bad samples, and puts batches into a queue.

A sample that cannot be decoded is found, reported and replaced. DALI's pipeline is unusable after such a failure, so a
new decoder is built.
"""

import atexit
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, Full, Queue

import numpy as np
import torch
from jaxtyping import Int32, Int64, Shaped
from torch import Tensor

from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchPlan, BatchSplit, MicroBatch, SampleId
from maelstream.pipeline.config import LoaderConfig
from maelstream.pipeline.decode import DECODERS, EncodedBatch
from maelstream.pipeline.erase import Erasing
from maelstream.pipeline.mix import Mix, MixOrder
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.output import Output
from maelstream.pipeline.sample_source import BadSamples, PlannedSource, SampleSource
from maelstream.pipeline.stream import Stream
from maelstream.pipeline.stream_source import StreamSource
from maelstream.pipeline.tracing import trace_range
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError
from maelstream.shards.inspect import UnusableImageError, inspect

CLOSED = "this image loader is closed; make a new one"
_POLL_S = 0.1  # how often a thread that waits for the queue checks whether the loader was closed


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    images: Shaped[Tensor, "b 3 h w"]  # uint8, or normalised as `Output` says
    keys: Int64[Tensor, "b"]  # hashed into masks; on the CPU, and the model moves them to its device
    samples: Int64[np.ndarray, "b"]
    epochs: Int64[np.ndarray, "b"]
    labels: Int32[np.ndarray, "b"]
    weight: float
    """Size of this slice divided by the mean size of slices: the average over slices of weight times mean loss is the
    mean loss of the global batch."""
    erasing: Erasing | None = None
    """Boxes that the caller erases after normalising, with `Output(erase=False)`."""


class Producer:
    """Delivers the micro-batches of one rank from global position `start`, without end."""

    def __init__(
        self,
        dataset: Dataset | Mix | Stream,
        order: SampleOrder | MixOrder,
        augment_sampler: AugmentSampler,
        batch_split: BatchSplit,
        rank: int,
        config: LoaderConfig,
        device: torch.device,
        output: Output,
        bad: BadSamples,
        start: int,
    ):
        """Starts the thread. The arguments are those of `ImageLoader`; `device` decodes."""
        self._dataset, self._order, self._augment_sampler = dataset, order, augment_sampler
        self._batch_split, self._rank, self._config = batch_split, rank, config
        self._device, self._output, self._bad = device, output, bad
        self._threads = config.threads or len(os.sched_getaffinity(0))
        self._batches: Queue[Batch | Exception] = Queue(config.prefetch)
        self._stop = threading.Event()
        # A daemon, so that Python ends although the queue is full; `close` joins it before that.
        self._thread = threading.Thread(target=self._run, args=(start,), name="loader", daemon=True)
        self._thread.start()
        # Before DALI's own function, which is registered at import: that one must find no pipeline at work.
        atexit.register(self.close)

    def take(self) -> Batch:
        """The next micro-batch.

        Raises:
            MaelstreamError: the producer is closed, or cannot read or decode; any other exception of its thread.
        """
        while not self._stop.is_set():
            with contextlib.suppress(Empty):
                item = self._batches.get(timeout=_POLL_S)
                if isinstance(item, Exception):
                    raise item
                return item
        raise MaelstreamError(CLOSED)

    def close(self) -> None:
        """Ends the thread and waits for it."""
        self._stop.set()
        atexit.unregister(self.close)
        if threading.current_thread() is not self._thread:  # the last reference may be dropped there
            self._thread.join()

    def _run(self, start: int) -> None:
        try:
            self._deliver(start)
        except Exception as error:
            self._offer(error)

    def _deliver(self, start: int) -> None:
        """Reads, decodes and delivers batches from global position `start` until it is closed."""
        delivered, prefetch = 0, self._config.prefetch
        source = open_sample_source(
            self._dataset, self._order, self._augment_sampler, self._batch_split, self._rank, prefetch, self._bad, start
        )
        with contextlib.closing(source):
            while not self._stop.is_set():
                with ReadAhead(source.read, delivered, prefetch) as ahead:
                    delivered += self._decode(source, ahead)

    def _decode(self, source: SampleSource, ahead: "ReadAhead") -> int:
        """Decodes until it is closed or a bad image has been replaced; returns the number of batches."""
        image_size, decode = self._augment_sampler.image_size, self._config.decode
        decoder = DECODERS[self._device.type](
            ahead, self._batch_split.largest, image_size, self._threads, self._device, self._output, decode
        )
        delivered = 0
        with contextlib.closing(decoder):
            while not self._stop.is_set():
                try:
                    images = decoder.run()
                except RuntimeError as error:  # DALI's, which does not say which image failed
                    bad = self._undecodable(ahead.decoding)
                    if not bad:
                        raise error
                    source.replace(bad)
                    break
                self._offer(self._batch(ahead.decoding.popleft()[0], images))
                delivered += 1
        return delivered

    def _undecodable(self, decoding: Iterable[tuple[MicroBatch, EncodedBatch]]) -> dict[SampleId, str]:
        """Samples of these micro-batches that DALI cannot decode, with the reasons."""
        reasons: dict[SampleId, str] = {}
        suspects: dict[SampleId, EncodedBatch] = {}
        for micro_batch, batch in decoding:
            for index, sample_id in enumerate(micro_batch.sample_ids()):
                one = slice(index, index + 1)
                suspects[sample_id] = EncodedBatch(
                    batch.encoded[one], batch.windows[one], batch.resizes[one], batch.flips[one], None
                )
                try:
                    inspect(batch.encoded[index].tobytes())
                except UnusableImageError as reason:
                    reasons[sample_id] = str(reason)

        image_size, decode = self._augment_sampler.image_size, self._config.decode

        def fails(sample_id: SampleId) -> bool:
            one, source = DECODERS[self._device.type], lambda _: suspects[sample_id]
            with contextlib.closing(one(source, 1, image_size, 1, self._device, config=decode)) as decoder:
                try:
                    decoder.run()
                except RuntimeError:
                    return True
                return False

        # One decoder per suspect is slow, so images that are visibly damaged are tried first.
        found = {sample_id: reasons[sample_id] for sample_id in reasons if fails(sample_id)}
        return found or {sample_id: "DALI cannot decode it" for sample_id in suspects if fails(sample_id)}

    def _batch(self, micro_batch: MicroBatch, images: Tensor) -> Batch:
        split, augment = self._batch_split, micro_batch.augment_params.pixel_augment
        return Batch(
            images=images,
            keys=torch.from_numpy(micro_batch.augment_params.keys),
            samples=micro_batch.samples,
            epochs=micro_batch.epochs,
            labels=micro_batch.labels,
            weight=len(micro_batch.samples) * split.world_size * split.micro_batches / split.batch_size,
            erasing=None if self._output.erase or augment is None else augment.erasing,
        )

    def _offer(self, item: Batch | Exception) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(Full):
                self._batches.put(item, timeout=_POLL_S)
                break


def open_sample_source(
    dataset: Dataset | Mix | Stream,
    order: SampleOrder | MixOrder,
    augment_sampler: AugmentSampler,
    batch_split: BatchSplit,
    rank: int,
    prefetch: int,
    bad: BadSamples,
    start: int,
) -> SampleSource:
    """The source of a rank's micro-batches from global position `start`."""
    if not isinstance(dataset, Stream):
        return PlannedSource(BatchPlan(dataset, order, augment_sampler, batch_split, rank), start, bad)
    assert isinstance(order, SampleOrder)
    return StreamSource(dataset, order, augment_sampler, batch_split, rank, start, prefetch, bad)


class ReadAhead:
    """Reads micro-batches ahead in threads, for a decoder to pull; as a context manager, it stops them at the end."""

    def __init__(self, read: Callable[[int], tuple[MicroBatch, EncodedBatch]], first: int, prefetch: int):
        """`read` returns a micro-batch by number; iteration 0 of the decoder is number `first`."""
        self._read, self._first, self._prefetch = read, first, prefetch
        self._readers = ThreadPoolExecutor(2, "read-ahead")
        self._ahead: deque[Future[tuple[MicroBatch, EncodedBatch]]] = deque()
        self.decoding: deque[tuple[MicroBatch, EncodedBatch]] = deque()
        """Pulled by the decoder, not yet delivered."""

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *exception: object) -> None:
        self._readers.shutdown(cancel_futures=True)

    def __call__(self, iteration: int) -> EncodedBatch:
        while len(self._ahead) <= self._prefetch:
            number = self._first + iteration + len(self._ahead)
            self._ahead.append(self._readers.submit(self._read_one, number))
        self.decoding.append(self._ahead.popleft().result())
        return self.decoding[-1][1]

    def _read_one(self, number: int) -> tuple[MicroBatch, EncodedBatch]:
        with trace_range("read"):
            return self._read(number)
