"""The loader of pre-training: epochs, ranks, read-ahead and the whole state of the data path in one number.

Samples stand in one endless line, epoch after epoch, each epoch in an order of its own; a global batch is the next
`batch_size` of the line, so every batch is full, a batch may span two epochs, and each sample comes exactly once an
epoch. A batch is cut into `world_size * micro_batches` slices by position alone: it holds the same samples, crops and
masks on any number of ranks, and the state is how far the line has been consumed.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Full, Queue
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor

from pipeline.decode import DECODERS, EncodedBatch
from pipeline.draws import AugmentDraws, Draws
from pipeline.order import SampleOrder
from shards.dataset import Dataset
from shards.errors import DatasetError, MaelstreamError
from shards.inspect import Unfit, inspect, refusal
from shards.reader import ShardReader

_POLL_S = 0.1  # how often a thread that waits on a queue looks whether the loader was closed


class LoaderState(TypedDict):
    """Where the line of samples stands: `position` samples of `epoch` have been consumed."""

    epoch: int
    position: int


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    images: UInt8[Tensor, "b 3 h w"]
    keys: Int64[Tensor, "b"]  # masks are hashed from these; on the CPU, the model's device takes them
    samples: Int64[np.ndarray, "b"]
    epochs: Int64[np.ndarray, "b"]
    labels: Int32[np.ndarray, "b"]
    weight: float
    """This slice's size over the mean slice's: mean losses times weights average to the global batch's mean loss."""


@dataclass(frozen=True)
class Slices:
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
class _Plan:
    """What a micro-batch holds, known before a byte is read."""

    samples: np.ndarray
    epochs: np.ndarray
    draws: Draws


class PretrainLoader:
    """Iterates over the micro-batches of one rank without end; use it as a context manager, which stops its threads.

    `state_dict()` tells the line's state after the last *whole* global batch that was handed out.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: SampleOrder,
        draws: AugmentDraws,
        image_size: tuple[int, int],
        slices: Slices,
        rank: int,
        threads: int,
        prefetch: int,
    ):
        """`threads` decode and, on the CPU, as many resize; `prefetch` micro-batches are read, and decoded, ahead."""
        if slices.batch_size > len(dataset):
            raise MaelstreamError(
                f"batch_size {slices.batch_size} is larger than the dataset: {dataset.folder} holds "
                f"{len(dataset)} samples; use a smaller batch_size"
            )
        self._dataset, self._order, self._draws, self._slices, self._rank = dataset, order, draws, slices, rank
        self._reader = ShardReader(dataset, check_crc=False)
        self._image_size, self._threads, self._prefetch = image_size, threads, prefetch
        self._consumed = 0
        self._stop = threading.Event()
        self._producer: threading.Thread | None = None

    def state_dict(self) -> LoaderState:
        epoch, position = divmod(self._consumed, len(self._dataset))
        return {"epoch": epoch, "position": position}

    def load_state_dict(self, state: LoaderState) -> None:
        """Goes on from `state`, in O(1); before the first batch is taken."""
        if self._producer is not None:
            raise RuntimeError("the loader runs already")
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

    def _plan(self, start: int, iteration: int) -> _Plan:
        """Micro-batch `iteration` of this rank, counted from where `start` samples of the line had been consumed."""
        step, micro_batch = divmod(iteration, self._slices.micro_batches)
        first, end = self._slices.bounds(self._rank, micro_batch)
        line = start + step * self._slices.batch_size + np.arange(first, end)
        epochs, positions = np.divmod(line, len(self._dataset))
        samples = self._order.at(epochs, positions)
        widths, heights = self._dataset.width[samples], self._dataset.height[samples]
        return _Plan(samples, epochs, self._draws.at(epochs, samples, widths, heights))

    def _read(self, plan: _Plan) -> EncodedBatch:
        """Copies the bytes off the memory map, so that no later stage waits on a cold page."""
        encoded = [data.tobytes() for data in self._reader.read(plan.samples)]
        sizes = self._dataset.width[plan.samples].tolist(), self._dataset.height[plan.samples].tolist()
        for data, sample, width, height in zip(encoded, plan.samples, *sizes, strict=True):
            if reason := refusal(data, width, height):
                raise DatasetError(f"{self._name(sample)}: {reason}; `maelstream verify` tells what else is damaged")
        arrays = [np.frombuffer(data, np.uint8) for data in encoded]
        return EncodedBatch(arrays, plan.draws.windows, plan.draws.flips)

    def _name(self, sample: int) -> str:
        shard = self._dataset.shard_names[int(self._dataset.shard[sample])]
        return f"{self._dataset.folder}/{shard}: sample {self._dataset.keys(np.array([sample]))[0]}"

    def _produce(self, start: int, device: torch.device, batches: "Queue[Batch | Exception]") -> None:
        """Body of the producer thread: reads ahead, decodes, and hands batches or what went wrong to the consumer."""
        readers = ThreadPoolExecutor(2, "read-ahead")
        ahead: deque[tuple[_Plan, Future[EncodedBatch]]] = deque()
        decoding: deque[_Plan] = deque()  # taken by DALI, not yet handed out

        def source(iteration: int) -> EncodedBatch:
            while len(ahead) <= self._prefetch:
                plan = self._plan(start, iteration + len(ahead))
                ahead.append((plan, readers.submit(self._read, plan)))
            plan, encoded = ahead.popleft()
            decoding.append(plan)
            return encoded.result()

        try:
            decoder = DECODERS[device.type](source, self._slices.largest, self._image_size, self._threads, device)
            while not self._stop.is_set():
                images = decoder.run()
                self._offer(batches, self._batch(decoding.popleft(), images))
        except RuntimeError as error:  # DALI's, which does not say which image of the batch it was
            self._offer(batches, self._undecodable(decoding, error))
        except Exception as error:
            self._offer(batches, error)
        finally:
            readers.shutdown(cancel_futures=True)

    def _undecodable(self, plans: Iterable[_Plan], error: RuntimeError) -> Exception:
        """The first sample of `plans` that would not be packed as it is now, or else `error`."""
        for sample in (sample for plan in plans for sample in plan.samples):
            (encoded,) = self._reader.read(np.array([sample]))
            try:
                inspect(encoded.tobytes())
            except Unfit as reason:
                return DatasetError(f"{self._name(sample)}: {reason}; `maelstream verify` tells what else is damaged")
        return error

    def _batch(self, plan: _Plan, images: Tensor) -> Batch:
        slices = self._slices
        return Batch(
            images=images,
            keys=torch.from_numpy(plan.draws.keys),
            samples=plan.samples,
            epochs=plan.epochs,
            labels=self._dataset.label[plan.samples],
            weight=len(plan.samples) * slices.world_size * slices.micro_batches / slices.batch_size,
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
