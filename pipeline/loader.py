"""The loader of pre-training: read-ahead, decoding, bad samples, and the whole state of the data path in one number.

What a batch holds is `pipeline.line`'s; this is how it gets there: threads read ahead, DALI decodes, a queue hands
over. A sample that cannot be decoded is found, named and replaced, and the decoder, which DALI gives up for lost, is
made anew.
"""

import contextlib
import math
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

from pipeline.decode import DECODERS, EncodedBatch, GpuDecode, Output
from pipeline.draws import AugmentDraws
from pipeline.line import Line, MicroBatch, Place, Slices
from pipeline.mix import Mix, MixOrder, MixReader
from pipeline.order import SampleOrder
from pipeline.windows import WindowReader
from shards.dataset import Dataset
from shards.errors import DatasetError, MaelstreamError
from shards.inspect import Unfit, inspect, refusal
from shards.reader import ShardReader

_POLL_S = 0.1  # how often a thread that waits on a queue looks whether the loader was closed
_LISTED = 10  # bad samples in an error


class LoaderState(TypedDict):
    """Where the line of samples stands: `position` samples of `epoch` have been consumed."""

    epoch: int
    position: int


@dataclass(frozen=True)
class BadSample:
    """One that was replaced."""

    sample: int
    shard: str
    """File."""
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key}: {self.reason}"


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    images: Shaped[Tensor, "b 3 h w"]  # uint8, or normalised; see `pipeline.decode.Output`
    keys: Int64[Tensor, "b"]  # masks are hashed from these; on the CPU, the model's device takes them
    samples: Int64[np.ndarray, "b"]
    epochs: Int64[np.ndarray, "b"]
    labels: Int32[np.ndarray, "b"]
    weight: float
    """This slice's size over the mean slice's: mean losses times weights average to the global batch's mean loss."""


class PretrainLoader:
    """Iterates over the micro-batches of one rank without end; use it as a context manager, which stops its threads.

    `state_dict()` tells the line's state after the last *whole* global batch that was handed out.
    """

    def __init__(
        self,
        dataset: Dataset | Mix,
        order: SampleOrder | MixOrder,
        draws: AugmentDraws,
        image_size: tuple[int, int],
        slices: Slices,
        rank: int,
        threads: int,
        prefetch: int,
        output: Output = Output(),
        gpu: GpuDecode = GpuDecode(),
        max_bad_share: float = 0.001,
        on_bad: Callable[[BadSample], None] = lambda _: None,
    ):
        """`threads` decode and, on the CPU, as many resize; `prefetch` micro-batches are read, and decoded, ahead.

        `output` says what images are handed over as; our models take the default's bytes and normalise them.
        `on_bad` is told of each sample that cannot be decoded and is replaced; when this rank has met more of them than
        `max_bad_share` of the dataset, iterating raises a DatasetError that lists them.
        """
        if slices.batch_size > len(dataset):
            raise MaelstreamError(
                f"batch_size {slices.batch_size} is larger than the dataset: {dataset.folder} holds "
                f"{len(dataset)} samples; use a smaller batch_size"
            )
        self._dataset, self._slices = dataset, slices
        self._line = Line(dataset, order, draws, slices, rank)
        self._reader: ShardReader | MixReader
        self._reader = MixReader(dataset, False) if isinstance(dataset, Mix) else ShardReader(dataset, False)
        self._image_size, self._threads, self._prefetch = image_size, threads, prefetch
        self._output, self._gpu = output, gpu
        self._bad: dict[int, BadSample] = {}
        self._bad_places: set[Place] = set()
        self._bad_lock = threading.Lock()
        self._most_bad, self._on_bad = math.ceil(max_bad_share * len(dataset)), on_bad
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

    def __enter__(self) -> "PretrainLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._producer is not None:
            self._producer.join()

    def __iter__(self) -> Iterator[Batch]:
        batches: Queue[Batch | Exception] = Queue(self._prefetch)
        # The current device is a thread's own: the producer is told this thread's.
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self._producer = threading.Thread(target=self._produce, args=(self._consumed, device, batches), name="loader")
        self._producer.start()
        while True:
            for _ in range(self._slices.micro_batches - 1):
                yield _take(batches)
            batch = _take(batches)
            self._consumed += self._slices.batch_size
            yield batch

    def _read(self, start: int, number: int, windows: WindowReader | None) -> tuple[MicroBatch, EncodedBatch]:
        """A micro-batch whose bytes may be handed to DALI."""
        while True:
            planned = self._line.at(start, number, self._bad_places)
            encoded = self._reader.read(planned.samples) if windows is None else windows.read(planned)
            sizes = (column[planned.samples].tolist() for column in (self._dataset.width, self._dataset.height))
            refusals = [refusal(memoryview(data), *size) for data, *size in zip(encoded, *sizes, strict=True)]
            if not any(refusals):
                draws = planned.draws
                return planned, EncodedBatch(encoded, draws.windows, draws.resizes, draws.flips, draws.changes)
            places = zip(planned.epochs.tolist(), planned.samples.tolist(), strict=True)
            self._replace({place: reason for place, reason in zip(places, refusals, strict=True) if reason is not None})

    def _replace(self, reasons: dict[Place, str]) -> None:
        """From now on others stand in these places; DatasetError when that would be too many samples."""
        with self._bad_lock:  # threads read ahead side by side
            self._bad_places |= reasons.keys()
            new = {sample: reason for (_, sample), reason in reasons.items() if sample not in self._bad}
            for sample, reason in new.items():
                self._bad[sample] = BadSample(sample, *self._dataset.path_and_key(sample), reason)
                self._on_bad(self._bad[sample])
            if len(self._bad) > self._most_bad:
                listed = "; ".join(map(str, list(self._bad.values())[:_LISTED]))
                raise DatasetError(
                    f"{len(self._bad)} bad samples, max_bad_share allows {self._most_bad}: {listed}; "
                    "`maelstream verify` tells what else is damaged"
                )

    def _produce(self, start: int, device: torch.device, batches: "Queue[Batch | Exception]") -> None:
        """Body of the producer thread: hands batches, or what went wrong, to the consumer."""
        handed_over = 0
        windows = None
        if self._line.order.shuffle == "block":
            assert isinstance(self._reader, ShardReader)  # a mix is not shuffled by blocks
            windows = WindowReader(self._line, self._reader, start)
        try:
            while not self._stop.is_set():
                with _Feed(lambda number: self._read(start, number, windows), handed_over, self._prefetch) as feed:
                    handed_over += self._decode(feed, device, batches)
        except Exception as error:
            self._offer(batches, error)
        finally:
            if windows is not None:
                windows.close()

    def _decode(self, feed: "_Feed", device: torch.device, batches: "Queue[Batch | Exception]") -> int:
        """Decodes until the loader is closed, or an image fails and is known for bad; how many were handed over."""
        decoder = DECODERS[device.type](
            feed, self._slices.largest, self._image_size, self._threads, device, self._output, self._gpu
        )
        handed_over = 0
        while not self._stop.is_set():
            try:
                images = decoder.run()
            except RuntimeError as error:  # DALI's, which does not say which image it was
                bad = self._undecodable(feed.decoding, device)
                if not bad:
                    raise error
                self._replace(bad)
                break
            self._offer(batches, self._batch(feed.decoding.popleft()[0], images))
            handed_over += 1
        return handed_over

    def _undecodable(
        self, decoding: Iterable[tuple[MicroBatch, EncodedBatch]], device: torch.device
    ) -> dict[Place, str]:
        """Where in these micro-batches stands what DALI cannot decode, and why."""
        reasons: dict[Place, str] = {}
        suspects: dict[Place, EncodedBatch] = {}
        for planned, batch in decoding:
            for number, place in enumerate(zip(planned.epochs.tolist(), planned.samples.tolist(), strict=True)):
                one = slice(number, number + 1)
                suspects[place] = EncodedBatch(
                    batch.encoded[one], batch.windows[one], batch.resizes[one], batch.flips[one], None
                )
                try:
                    inspect(batch.encoded[number].tobytes())
                except Unfit as reason:
                    reasons[place] = str(reason)

        def fails(place: Place) -> bool:
            try:
                DECODERS[device.type](lambda _: suspects[place], 1, self._image_size, 1, device, gpu=self._gpu).run()
            except RuntimeError:
                return True
            return False

        # A decoder for each takes time, so those first that are damaged at all.
        found = {place: reasons[place] for place in reasons if fails(place)}
        return found or {place: "DALI cannot decode it" for place in suspects if fails(place)}

    def _batch(self, planned: MicroBatch, images: Tensor) -> Batch:
        slices = self._slices
        return Batch(
            images=images,
            keys=torch.from_numpy(planned.draws.keys),
            samples=planned.samples,
            epochs=planned.epochs,
            labels=self._dataset.label[planned.samples],
            weight=len(planned.samples) * slices.world_size * slices.micro_batches / slices.batch_size,
        )

    def _offer(self, batches: "Queue[Batch | Exception]", item: Batch | Exception) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(Full):
                batches.put(item, timeout=_POLL_S)
                break


def _take(batches: "Queue[Batch | Exception]") -> Batch:
    item = batches.get()
    if isinstance(item, Exception):
        raise item
    return item


class _Feed:
    """What a decoder asks for, read ahead by threads; use it as a context manager, which stops them."""

    def __init__(self, read: Callable[[int], tuple[MicroBatch, EncodedBatch]], first: int, prefetch: int):
        """`read` gives a micro-batch by number; iteration 0 of the decoder is number `first`."""
        self._read, self._first, self._prefetch = read, first, prefetch
        self._readers = ThreadPoolExecutor(2, "read-ahead")
        self._ahead: deque[Future[tuple[MicroBatch, EncodedBatch]]] = deque()
        self.decoding: deque[tuple[MicroBatch, EncodedBatch]] = deque()
        """Taken by the decoder, not yet handed out."""

    def __enter__(self) -> "_Feed":
        return self

    def __exit__(self, *exception: object) -> None:
        self._readers.shutdown(cancel_futures=True)

    def __call__(self, iteration: int) -> EncodedBatch:
        while len(self._ahead) <= self._prefetch:
            number = self._first + iteration + len(self._ahead)
            self._ahead.append(self._readers.submit(self._read, number))
        self.decoding.append(self._ahead.popleft().result())
        return self.decoding[-1][1]
