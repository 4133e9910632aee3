"""The image loader: read-ahead, decoding and replacement of bad samples; its whole state is one number.

`pipeline/batch_plan.py` decides what a batch contains. Here, threads read ahead, DALI decodes, and a queue delivers
batches. A sample that cannot be decoded is found, reported and replaced. DALI's pipeline is unusable after such a
failure, so the loader builds a new decoder.
"""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Full, Queue
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Int32, Int64, Shaped
from torch import Tensor

from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchPlan, BatchSplit, MicroBatch, SampleId
from maelstream.pipeline.config import LoaderConfig
from maelstream.pipeline.decode import DECODERS, EncodedBatch, decode_device
from maelstream.pipeline.erase import Erasing
from maelstream.pipeline.mix import Mix, MixOrder
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.output import Output
from maelstream.pipeline.sample_source import BadSample, BadSamples, PlannedSource, SampleSource
from maelstream.pipeline.stream import Stream
from maelstream.pipeline.stream_source import StreamSource
from maelstream.pipeline.tracing import trace_range
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError
from maelstream.shards.inspect import UnusableImageError, inspect

_POLL_S = 0.1  # how often a thread that waits for a queue checks whether the loader was closed


class LoaderState(TypedDict):
    """How far training has come: `position` samples of `epoch` have been consumed."""

    epoch: int
    position: int


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


class ImageLoader:
    """Iterates without end over the micro-batches of one rank; as a context manager, it stops its threads at the end.

    `state_dict()` is the state after the last *whole* global batch that was delivered.
    """

    def __init__(
        self,
        dataset: Dataset | Mix | Stream,
        order: SampleOrder | MixOrder,
        augment_sampler: AugmentSampler,
        batch_split: BatchSplit,
        rank: int = 0,
        config: LoaderConfig = LoaderConfig(),
        output: Output = Output(),
        on_bad: Callable[[BadSample], None] = lambda _: None,
    ):
        """Checks the arguments; iterating opens files and starts threads.

        Args:
            order: order of the samples, or of the shards of a stream.
            augment_sampler: draws crops and masks, and has the size of the images.
            config: with `threads` 0, this process uses all its cores; set `threads` if ranks share a machine.
            output: dtype, layout and normalisation of the images. Our models take the default, bytes.
            on_bad: called once for each sample that cannot be decoded and is replaced. When this rank has found more
                of them than `config.max_bad_share` of the dataset, iterating raises a DatasetError that lists them.

        Raises:
            MaelstreamError: the dataset is smaller than a global batch.
        """
        if batch_split.batch_size > len(dataset):
            raise MaelstreamError(
                f"batch_size {batch_split.batch_size} is larger than the dataset: {dataset.folder} holds "
                f"{len(dataset)} samples; use a smaller batch_size"
            )
        self.dataset, self._order, self._augment_sampler = dataset, order, augment_sampler
        self._batch_split, self._rank = batch_split, rank
        self._config, self._output = config, output
        self._threads = config.threads or len(os.sched_getaffinity(0))
        self._bad = BadSamples(config.max_bad_share, len(dataset), on_bad)
        self._consumed = 0
        self._stop = threading.Event()
        self._producer: threading.Thread | None = None

    def state_dict(self) -> LoaderState:
        epoch, position = divmod(self._consumed, len(self.dataset))
        return {"epoch": epoch, "position": position}

    def load_state_dict(self, state: LoaderState) -> None:
        """Resumes from `state`, in O(1); call it before the first batch is taken.

        Raises:
            MaelstreamError: the state is that of another dataset.
        """
        if self._producer is not None:
            raise RuntimeError("load_state_dict must be called before the loader is iterated")
        if state["epoch"] < 0 or not 0 <= state["position"] < len(self.dataset):
            raise MaelstreamError(
                f"epoch {state['epoch']}, position {state['position']}: {self.dataset.folder} has positions 0 to "
                f"{len(self.dataset) - 1:,}; the state is another dataset's"
            )
        self._consumed = state["epoch"] * len(self.dataset) + state["position"]

    def __enter__(self) -> "ImageLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._producer is not None:
            self._producer.join()

    def __iter__(self) -> Iterator[Batch]:
        # Not earlier: the launcher chooses the rank's GPU after the loader is constructed.
        self._device = decode_device(self._config.decode)
        batches: Queue[Batch | Exception] = Queue(self._config.prefetch)
        self._producer = threading.Thread(target=self._produce, args=(self._consumed, batches), name="loader")
        self._producer.start()
        while True:
            for _ in range(self._batch_split.micro_batches - 1):
                yield _take(batches)
            batch = _take(batches)
            self._consumed += self._batch_split.batch_size
            yield batch

    def _produce(self, start: int, batches: "Queue[Batch | Exception]") -> None:
        """Body of the producer thread: delivers batches, or the exception that ended it, to the consumer."""
        try:
            self._deliver(start, batches)
        except Exception as error:
            self._offer(batches, error)

    def _deliver(self, start: int, batches: "Queue[Batch | Exception]") -> None:
        """Reads, decodes and delivers batches from global position `start` until the loader is closed."""
        delivered, prefetch = 0, self._config.prefetch
        source = open_sample_source(
            self.dataset, self._order, self._augment_sampler, self._batch_split, self._rank, prefetch, self._bad, start
        )
        with contextlib.closing(source):
            while not self._stop.is_set():
                with ReadAhead(source.read, delivered, prefetch) as ahead:
                    delivered += self._decode(source, ahead, batches)

    def _decode(self, source: SampleSource, ahead: "ReadAhead", batches: "Queue[Batch | Exception]") -> int:
        """Decodes until the loader is closed or a bad image has been replaced; returns the number of batches."""
        image_size, decode = self._augment_sampler.image_size, self._config.decode
        decoder = DECODERS[self._device.type](
            ahead, self._batch_split.largest, image_size, self._threads, self._device, self._output, decode
        )
        delivered = 0
        while not self._stop.is_set():
            try:
                images = decoder.run()
            except RuntimeError as error:  # DALI's, which does not say which image failed
                bad = self._undecodable(ahead.decoding)
                if not bad:
                    raise error
                source.replace(bad)
                break
            self._offer(batches, self._batch(ahead.decoding.popleft()[0], images))
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
            try:
                DECODERS[self._device.type](
                    lambda _: suspects[sample_id], 1, image_size, 1, self._device, config=decode
                ).run()
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

    def _offer(self, batches: "Queue[Batch | Exception]", item: Batch | Exception) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(Full):
                batches.put(item, timeout=_POLL_S)
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


def _take(batches: "Queue[Batch | Exception]") -> Batch:
    item = batches.get()
    if isinstance(item, Exception):
        raise item
    return item


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
