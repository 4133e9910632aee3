"""The loader of pre-training: read-ahead, decoding, bad samples, and the whole state of the data path in one number.

What a batch holds is `maelstream.pipeline.batch_plan`'s; this is how it gets there: threads read ahead, DALI decodes, a queue hands
over. A sample that cannot be decoded is found, named and replaced, and the decoder, which DALI gives up for lost, is
made anew.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import Full, Queue
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Int32, Int64, Shaped
from torch import Tensor

from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchPlan, BatchSplit, MicroBatch, SampleId
from maelstream.pipeline.decode import DECODERS, DecodeConfig, EncodedBatch, Output
from maelstream.pipeline.mix import Mix, MixOrder
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.sample_source import BadSample, BadSamples, PlannedSource, SampleSource
from maelstream.pipeline.stream import Stream, StreamSource
from maelstream.pipeline.tracing import stage
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError
from maelstream.shards.inspect import Unfit, inspect

_POLL_S = 0.1  # how often a thread that waits on a queue looks whether the loader was closed


class LoaderState(TypedDict):
    """Where the line of samples stands: `position` samples of `epoch` have been consumed."""

    epoch: int
    position: int


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    images: Shaped[Tensor, "b 3 h w"]  # uint8, or normalised; see `maelstream.pipeline.decode.Output`
    keys: Int64[Tensor, "b"]  # masks are hashed from these; on the CPU, the model's device takes them
    samples: Int64[np.ndarray, "b"]
    epochs: Int64[np.ndarray, "b"]
    labels: Int32[np.ndarray, "b"]
    weight: float
    """This slice's size over the mean slice's: mean losses times weights average to the global batch's mean loss."""


class ImageLoader:
    """Iterates over the micro-batches of one rank without end; use it as a context manager, which stops its threads.

    `state_dict()` tells the line's state after the last *whole* global batch that was handed out.
    """

    def __init__(
        self,
        dataset: Dataset | Mix | Stream,
        order: SampleOrder | MixOrder,
        draws: AugmentSampler,
        image_size: tuple[int, int],
        batch_split: BatchSplit,
        rank: int,
        threads: int,
        prefetch: int,
        output: Output = Output(),
        decode: DecodeConfig = DecodeConfig(),
        max_bad_share: float = 0.001,
        on_bad: Callable[[BadSample], None] = lambda _: None,
    ):
        """`order` is that of the samples; of a stream, that of its shards.

        `threads` decode and, on the CPU, as many resize; `prefetch` micro-batches are read, and decoded, ahead.

        `output` says what images are handed over as; our models take the default's bytes and normalise them.
        `on_bad` is told of each sample that cannot be decoded and is replaced; when this rank has met more of them than
        `max_bad_share` of the dataset, iterating raises a DatasetError that lists them.
        """
        if batch_split.batch_size > len(dataset):
            raise MaelstreamError(
                f"batch_size {batch_split.batch_size} is larger than the dataset: {dataset.folder} holds "
                f"{len(dataset)} samples; use a smaller batch_size"
            )
        self._dataset, self._slices = dataset, batch_split
        self._image_size, self._threads, self._prefetch = image_size, threads, prefetch
        self._output, self._config = output, decode
        bad = BadSamples(max_bad_share, len(dataset), on_bad)
        self._feed = partial(sample_source_of, dataset, order, draws, batch_split, rank, prefetch, bad)
        self._consumed = 0
        self._stop = threading.Event()
        self._producer: threading.Thread | None = None

    def state_dict(self) -> LoaderState:
        epoch, position = divmod(self._consumed, len(self._dataset))
        return {"epoch": epoch, "position": position}

    def load_state_dict(self, state: LoaderState) -> None:
        """Goes on from `state`, in O(1); before the first batch is taken. MaelstreamError for one of other data."""
        if self._producer is not None:
            raise RuntimeError("the loader runs already")
        if state["epoch"] < 0 or not 0 <= state["position"] < len(self._dataset):
            raise MaelstreamError(
                f"epoch {state['epoch']}, position {state['position']}: {self._dataset.folder} has positions 0 to "
                f"{len(self._dataset) - 1:,}; the state is another dataset's"
            )
        self._consumed = state["epoch"] * len(self._dataset) + state["position"]

    def __enter__(self) -> "ImageLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._producer is not None:
            self._producer.join()

    def __iter__(self) -> Iterator[Batch]:
        self._device = self._config.device  # not sooner: a launcher chooses a rank's GPU after the loader is made
        batches: Queue[Batch | Exception] = Queue(self._prefetch)
        self._producer = threading.Thread(target=self._produce, args=(self._consumed, batches), name="loader")
        self._producer.start()
        while True:
            for _ in range(self._slices.micro_batches - 1):
                yield _take(batches)
            batch = _take(batches)
            self._consumed += self._slices.batch_size
            yield batch

    def _produce(self, start: int, batches: "Queue[Batch | Exception]") -> None:
        """Body of the producer thread: hands batches, or what went wrong, to the consumer."""
        handed_over, feed = 0, self._feed(start)
        try:
            while not self._stop.is_set():
                with ReadAhead(feed.read, handed_over, self._prefetch) as ahead:
                    handed_over += self._decode(feed, ahead, batches)
        except Exception as error:
            self._offer(batches, error)
        finally:
            feed.close()

    def _decode(self, feed: SampleSource, ahead: "ReadAhead", batches: "Queue[Batch | Exception]") -> int:
        """Decodes until the loader is closed, or an image fails and is known for bad; how many were handed over."""
        decoder = DECODERS[self._device.type](
            ahead, self._slices.largest, self._image_size, self._threads, self._device, self._output, self._config
        )
        handed_over = 0
        while not self._stop.is_set():
            try:
                images = decoder.run()
            except RuntimeError as error:  # DALI's, which does not say which image it was
                bad = self._undecodable(ahead.decoding)
                if not bad:
                    raise error
                feed.replace(bad)
                break
            self._offer(batches, self._batch(ahead.decoding.popleft()[0], images))
            handed_over += 1
        return handed_over

    def _undecodable(self, decoding: Iterable[tuple[MicroBatch, EncodedBatch]]) -> dict[SampleId, str]:
        """Where in these micro-batches stands what DALI cannot decode, and why."""
        reasons: dict[SampleId, str] = {}
        suspects: dict[SampleId, EncodedBatch] = {}
        for planned, batch in decoding:
            for number, place in enumerate(planned.places()):
                one = slice(number, number + 1)
                suspects[place] = EncodedBatch(
                    batch.encoded[one], batch.windows[one], batch.resizes[one], batch.flips[one], None
                )
                try:
                    inspect(batch.encoded[number].tobytes())
                except Unfit as reason:
                    reasons[place] = str(reason)

        def fails(place: SampleId) -> bool:
            try:
                DECODERS[self._device.type](
                    lambda _: suspects[place], 1, self._image_size, 1, self._device, config=self._config
                ).run()
            except RuntimeError:
                return True
            return False

        # A decoder for each takes time, so those first that are damaged at all.
        found = {place: reasons[place] for place in reasons if fails(place)}
        return found or {place: "DALI cannot decode it" for place in suspects if fails(place)}

    def _batch(self, planned: MicroBatch, images: Tensor) -> Batch:
        batch_split = self._slices
        return Batch(
            images=images,
            keys=torch.from_numpy(planned.draws.keys),
            samples=planned.samples,
            epochs=planned.epochs,
            labels=planned.labels,
            weight=len(planned.samples) * batch_split.world_size * batch_split.micro_batches / batch_split.batch_size,
        )

    def _offer(self, batches: "Queue[Batch | Exception]", item: Batch | Exception) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(Full):
                batches.put(item, timeout=_POLL_S)
                break


def sample_source_of(
    dataset: Dataset | Mix | Stream,
    order: SampleOrder | MixOrder,
    draws: AugmentSampler,
    batch_split: BatchSplit,
    rank: int,
    prefetch: int,
    bad: BadSamples,
    start: int,
) -> SampleSource:
    """What a rank reads where `start` samples have been consumed."""
    if not isinstance(dataset, Stream):
        return PlannedSource(BatchPlan(dataset, order, draws, batch_split, rank), start, bad)
    assert isinstance(order, SampleOrder)
    return StreamSource(dataset, order, draws, batch_split, rank, start, prefetch, bad)


def _take(batches: "Queue[Batch | Exception]") -> Batch:
    item = batches.get()
    if isinstance(item, Exception):
        raise item
    return item


class ReadAhead:
    """What a decoder asks for, read ahead by threads; use it as a context manager, which stops them."""

    def __init__(self, read: Callable[[int], tuple[MicroBatch, EncodedBatch]], first: int, prefetch: int):
        """`read` gives a micro-batch by number; iteration 0 of the decoder is number `first`."""
        self._read, self._first, self._prefetch = read, first, prefetch
        self._readers = ThreadPoolExecutor(2, "read-ahead")
        self._ahead: deque[Future[tuple[MicroBatch, EncodedBatch]]] = deque()
        self.decoding: deque[tuple[MicroBatch, EncodedBatch]] = deque()
        """Taken by the decoder, not yet handed out."""

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
        with stage("read"):
            return self._read(number)
