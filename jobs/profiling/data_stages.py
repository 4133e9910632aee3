"""The stages of the data path, each alone at its limit: storage, read, decode, augment; and a loader of all of them."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchPlan, BatchSplit, MicroBatch
from maelstream.pipeline.decode import DECODERS, DecodeConfig, EncodedBatch
from maelstream.pipeline.loader import ImageLoader, ReadAhead, sample_source_of
from maelstream.pipeline.mix import Mix, MixOrder
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.sample_source import BadSamples, PlannedSource, SampleSource
from maelstream.pipeline.stage_pipelines import augment_alone, decode_alone
from maelstream.pipeline.stream import Stream
from maelstream.shards.dataset import Dataset

WARM_UP = 4  # batches
_HELD = 8  # batches that stay in memory
_CHUNK_BYTES = 2**23
_CHUNKS = 128  # of a sequential read: 1 GiB at the most
_REQUESTS = 4  # sequential reads side by side


def rate(run: Callable[[int], object], size: int, seconds: float, warm_up: int = WARM_UP) -> float:
    """Images/s of `run`, called with 0, 1, 2, ... for about `seconds`, once past the start; each makes `size`."""
    for number in range(warm_up):
        run(number)
    began, number = time.perf_counter(), warm_up
    while number == warm_up or time.perf_counter() - began < seconds:
        run(number)
        number += 1
    return (number - warm_up) * size / (time.perf_counter() - began)


class Sequential(NamedTuple):
    """Bytes/s of shards read from end to end."""

    cold: float
    """Not from the system's page cache, where it lets go of the shards; what a store does."""
    again: float
    """The same bytes at once once more: of a local disk, the page cache."""


@dataclass(frozen=True)
class Streamed:
    """What a loader streams, and how."""

    dataset: Dataset | Mix | Stream
    order: SampleOrder | MixOrder
    draws: AugmentSampler
    batch_split: BatchSplit
    rank: int
    threads: int
    prefetch: int
    decode: DecodeConfig

    def loader(self) -> ImageLoader:
        """The loader that pre-training would use; it stops at no share of bad samples."""
        return ImageLoader(
            self.dataset,
            self.order,
            self.draws,
            self.draws.image_size,
            self.batch_split,
            self.rank,
            self.threads,
            self.prefetch,
            decode=self.decode,
            max_bad_share=1.0,
        )

    def feed(self) -> SampleSource:
        """What reads for the loader."""
        bad = BadSamples(1, len(self.dataset), lambda _: None)
        return sample_source_of(
            self.dataset, self.order, self.draws, self.batch_split, self.rank, self.prefetch, bad, 0
        )

    @cached_property
    def line(self) -> BatchPlan | None:
        """None of a stream, whose order is that in which it is read."""
        if isinstance(self.dataset, Stream):
            return None
        return BatchPlan(self.dataset, self.order, self.draws, self.batch_split, self.rank)

    @cached_property
    def held(self) -> list[EncodedBatch]:
        """The first batches, in memory."""
        feed = self.feed()
        try:
            return [feed.read(number)[1] for number in range(_HELD)]
        finally:
            feed.close()

    @property
    def bytes_an_image(self) -> float:
        """Encoded, on average."""
        return float(np.mean([len(data) for batch in self.held for data in batch.encoded]))

    def draws_rate(self, line: BatchPlan, seconds: float) -> float:
        """Images/s of planning alone: order, crops, flips."""
        return rate(lambda number: line.at(0, number, ()), self.batch_split.largest, seconds)

    def storage_rate(self, line: BatchPlan, seconds: float) -> float:
        """Images/s of bytes alone, in the order of the line, by as many readers as the loader has."""
        feed = PlannedSource(line, 0, BadSamples(1, len(line.dataset), lambda _: None))

        def read(number: int) -> tuple[MicroBatch, EncodedBatch]:
            planned = line.at(0, number, ())
            return planned, EncodedBatch.of(feed.stored(planned), planned.draws)

        try:
            return self._ahead_rate(read, seconds)
        finally:
            feed.close()

    def read_rate(self, seconds: float) -> float:
        """Images/s planned, read and looked through, by as many readers as the loader has."""
        feed = self.feed()
        try:
            return self._ahead_rate(feed.read, seconds)
        finally:
            feed.close()

    def decode_rate(self, seconds: float) -> float:
        """Images/s of windows decoded from memory."""
        decode = decode_alone(self.held, self.draws.image_size, self.threads, self.decode.device, self.decode)
        return rate(lambda _: decode(), self.batch_split.largest, seconds)

    def augment_rate(self, seconds: float) -> tuple[float, float]:
        """Images/s of windows resized, flipped and changed; and bytes of the mean window."""
        device = self.decode.device
        augment, size = augment_alone(self.held, self.draws.image_size, self.threads, device, self.decode)
        return rate(lambda _: augment(), self.batch_split.largest, seconds), size

    def decoder_rate(self, seconds: float) -> float:
        """Images/s of the decoder as the loader has it, fed from memory."""
        decoder = DECODERS[self.decode.device.type](
            lambda number: self.held[number % len(self.held)],
            self.batch_split.largest,
            self.draws.image_size,
            self.threads,
            self.decode.device,
            config=self.decode,
        )
        return rate(lambda _: decoder.run(), self.batch_split.largest, seconds)

    def _ahead_rate(self, read: Callable[[int], tuple[MicroBatch, EncodedBatch]], seconds: float) -> float:
        with ReadAhead(read, 0, self.prefetch) as ahead:

            def take(number: int) -> None:
                ahead(number)
                ahead.decoding.popleft()

            return rate(take, self.batch_split.largest, seconds, WARM_UP + self.prefetch)


def sequential(dataset: Dataset) -> Sequential:
    """Reads up to 1 GiB of the dataset's shards, twice. Lets the system forget them before, where they are local."""
    sizes = [shard["bytes"] for shard in dataset.manifest["shards"]]
    chunks = [
        (number, start, min(_CHUNK_BYTES, size - start))
        for number, size in enumerate(sizes)
        for start in range(0, size, _CHUNK_BYTES)
    ][:_CHUNKS]
    numbers = {number for number, _, _ in chunks}
    if dataset.storage.local:
        for number in numbers:
            _forget(f"{dataset.storage.path}/{dataset.shard_names[number]}")
    files = {number: dataset.storage.open(dataset.shard_names[number]) for number in numbers}

    def seconds() -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(_REQUESTS) as readers:
            for _ in readers.map(lambda chunk: files[chunk[0]].read_at(chunk[2], chunk[1]), chunks):
                pass
        return time.perf_counter() - began

    total = sum(size for _, _, size in chunks)
    return Sequential(total / seconds(), total / seconds())


def fits_in_memory(dataset: Dataset) -> bool:
    """Whether the system can keep all shards in its page cache, going by half of the machine's memory."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return dataset.storage.local and sum(shard["bytes"] for shard in dataset.manifest["shards"]) < machine / 2


def _forget(path: str) -> None:
    """Drops a file's clean pages from the cache."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
