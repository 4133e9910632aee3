"""Measures the stages of the data path, each alone: storage, read, decode, augment; and builds the loader of all."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchPlan, BatchSplit, MicroBatch
from maelstream.pipeline.config import LoaderConfig
from maelstream.pipeline.decode import DECODERS, EncodedBatch, decode_device
from maelstream.pipeline.loader import ImageLoader
from maelstream.pipeline.mix import Mix, MixOrder
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.producer import ReadAhead, open_sample_source
from maelstream.pipeline.sample_source import BadSamples, PlannedSource, SampleSource
from maelstream.pipeline.stage_pipelines import augment_only, decode_only
from maelstream.pipeline.stream import Stream
from maelstream.shards.dataset import Dataset

WARM_UP = 4  # batches
_CACHED_BATCHES = 8  # batches kept in memory, from which decoding is measured
_CHUNK_BYTES = 2**23
_MAX_CHUNKS = 128  # of a sequential read: at most 1 GiB
_CONCURRENT_READS = 4


def measure_rate(run: Callable[[int], object], size: int, seconds: float, warm_up: int = WARM_UP) -> float:
    """Images/s of `run`, which is called with 0, 1, 2, ... for about `seconds` and makes `size` images per call.

    The first `warm_up` calls do not count.
    """
    for number in range(warm_up):
        run(number)
    began, number = time.perf_counter(), warm_up
    while number == warm_up or time.perf_counter() - began < seconds:
        run(number)
        number += 1
    return (number - warm_up) * size / (time.perf_counter() - began)


class SequentialReadRate(NamedTuple):
    """Bytes/s of shards that are read from end to end."""

    cold: float
    """From the disk or the remote storage: local shards are dropped from the system's page cache before."""
    warm: float
    """The same bytes read again at once: those of a local disk come from the page cache."""


@dataclass(frozen=True)
class DataPath:
    """The data path of one rank: what its loader reads, in which order, and the loader's settings."""

    dataset: Dataset | Mix | Stream
    order: SampleOrder | MixOrder
    sampler: AugmentSampler
    batch_split: BatchSplit
    rank: int
    loader_config: LoaderConfig

    def loader(self) -> ImageLoader:
        """The loader that pre-training would use, except that no share of bad samples stops it."""
        return ImageLoader(
            self.dataset,
            self.order,
            self.sampler,
            self.batch_split,
            self.rank,
            replace(self.loader_config, max_bad_share=1.0),
        )

    def sample_source(self) -> SampleSource:
        """Reads the encoded images for the loader."""
        bad = BadSamples(1, len(self.dataset), lambda _: None)
        prefetch = self.loader_config.prefetch
        return open_sample_source(self.dataset, self.order, self.sampler, self.batch_split, self.rank, prefetch, bad, 0)

    @cached_property
    def batch_plan(self) -> BatchPlan | None:
        """None for a stream, whose samples come in the order in which they are read."""
        if isinstance(self.dataset, Stream):
            return None
        return BatchPlan(self.dataset, self.order, self.sampler, self.batch_split, self.rank)

    @cached_property
    def cached_batches(self) -> list[EncodedBatch]:
        """The first batches, in memory."""
        source = self.sample_source()
        try:
            return [source.read(number)[1] for number in range(_CACHED_BATCHES)]
        finally:
            source.close()

    @property
    def bytes_per_image(self) -> float:
        """Mean size of an encoded image."""
        return float(np.mean([len(data) for batch in self.cached_batches for data in batch.encoded]))

    def plan_rate(self, plan: BatchPlan, seconds: float) -> float:
        """Images/s of planning alone: order, crops, flips."""
        return measure_rate(lambda number: plan.micro_batch(0, number, ()), self.batch_split.largest, seconds)

    def storage_rate(self, plan: BatchPlan, seconds: float) -> float:
        """Images/s of reading bytes alone, in the order of `plan`, with as many readers as the loader has."""
        source = PlannedSource(plan, 0, BadSamples(1, len(plan.dataset), lambda _: None))

        def read(number: int) -> tuple[MicroBatch, EncodedBatch]:
            micro_batch = plan.micro_batch(0, number, ())
            return micro_batch, EncodedBatch.of(source.read_encoded(micro_batch), micro_batch.augment_params)

        try:
            return self._read_ahead_rate(read, seconds)
        finally:
            source.close()

    def read_rate(self, seconds: float) -> float:
        """Images/s of planning, reading and checking, with as many readers as the loader has."""
        source = self.sample_source()
        try:
            return self._read_ahead_rate(source.read, seconds)
        finally:
            source.close()

    def decode_rate(self, seconds: float) -> float:
        """Images/s of decoding crop windows from memory."""
        image_size, config = self.sampler.image_size, self.loader_config
        device = decode_device(config.decode)
        decode = decode_only(self.cached_batches, image_size, config.threads, device, config.decode)
        return measure_rate(lambda _: decode(), self.batch_split.largest, seconds)

    def augment_rate(self, seconds: float) -> tuple[float, float]:
        """Images/s of resizing, flipping and pixel augmentation; and the mean size of a crop window in bytes."""
        image_size, config = self.sampler.image_size, self.loader_config
        device = decode_device(config.decode)
        augment, size = augment_only(self.cached_batches, image_size, config.threads, device, config.decode)
        return measure_rate(lambda _: augment(), self.batch_split.largest, seconds), size

    def decoder_rate(self, seconds: float) -> float:
        """Images/s of the loader's own decoder, which reads from memory."""
        config = self.loader_config
        device = decode_device(config.decode)
        decoder = DECODERS[device.type](
            lambda number: self.cached_batches[number % len(self.cached_batches)],
            self.batch_split.largest,
            self.sampler.image_size,
            config.threads,
            device,
            config=config.decode,
        )
        return measure_rate(lambda _: decoder.run(), self.batch_split.largest, seconds)

    def _read_ahead_rate(self, read: Callable[[int], tuple[MicroBatch, EncodedBatch]], seconds: float) -> float:
        with ReadAhead(read, 0, self.loader_config.prefetch) as ahead:

            def take(number: int) -> None:
                ahead(number)
                ahead.decoding.popleft()

            return measure_rate(take, self.batch_split.largest, seconds, WARM_UP + self.loader_config.prefetch)


def sequential_read_rate(dataset: Dataset) -> SequentialReadRate:
    """Reads up to 1 GiB of the dataset's shards twice.

    Before the first read, local shards are dropped from the system's page cache.
    """
    sizes = [shard["bytes"] for shard in dataset.manifest["shards"]]
    chunks = [
        (number, start, min(_CHUNK_BYTES, size - start))
        for number, size in enumerate(sizes)
        for start in range(0, size, _CHUNK_BYTES)
    ][:_MAX_CHUNKS]
    numbers = {number for number, _, _ in chunks}
    if dataset.storage.local:
        for number in numbers:
            _drop_from_page_cache(f"{dataset.storage.path}/{dataset.shard_names[number]}")
    files = {number: dataset.storage.open(dataset.shard_names[number]) for number in numbers}

    def read_all_s() -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(_CONCURRENT_READS) as readers:
            for _ in readers.map(lambda chunk: files[chunk[0]].read_at(chunk[2], chunk[1]), chunks):
                pass
        return time.perf_counter() - began

    total = sum(size for _, _, size in chunks)
    return SequentialReadRate(total / read_all_s(), total / read_all_s())


def fits_in_page_cache(dataset: Dataset) -> bool:
    """Whether all shards are local and fit into half of the machine's memory, so that the system can cache them."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return dataset.storage.local and sum(shard["bytes"] for shard in dataset.manifest["shards"]) < memory / 2


def _drop_from_page_cache(path: str) -> None:
    """Asks the system to drop the clean pages of a file from its cache."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
