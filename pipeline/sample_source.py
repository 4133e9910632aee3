"""Micro-batches with their bytes, such as may be handed to DALI; what cannot be decoded is named and replaced.

`PlannedSource` serves what can be read by number; `maelstream.pipeline.stream` what can only be read through.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from maelstream.pipeline.batch_plan import BatchPlan, MicroBatch, SampleId
from maelstream.pipeline.block_reads import BlockReads
from maelstream.pipeline.decode import EncodedBatch
from maelstream.pipeline.mix import Mix, MixReader
from maelstream.pipeline.tracing import stage
from maelstream.shards.errors import DatasetError
from maelstream.shards.inspect import refusal
from maelstream.shards.reader import ShardReader

_LISTED = 10  # bad samples in an error


@dataclass(frozen=True)
class BadSample:
    """One that was replaced."""

    sample: int
    shard: str
    """File or URL."""
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key}: {self.reason}"


class BadSamples:
    """Those that were met; safe to call from several threads."""

    def __init__(self, max_share: float, size: int, on_bad: Callable[[BadSample], None]):
        """More than `max_share` of `size` samples are too many; `on_bad` is told of each once."""
        self._most, self._on_bad = math.ceil(max_share * size), on_bad
        self._met: dict[int, BadSample] = {}
        self._lock = threading.Lock()

    def add(self, bad: BadSample) -> None:
        """DatasetError, which lists them, when that is one too many."""
        with self._lock:
            if bad.sample in self._met:
                return
            self._met[bad.sample] = bad
            self._on_bad(bad)
            if len(self._met) > self._most:
                listed = "; ".join(map(str, list(self._met.values())[:_LISTED]))
                raise DatasetError(
                    f"{len(self._met)} bad samples, max_bad_share allows {self._most}: {listed}; "
                    "`maelstream verify` tells what else is damaged"
                )


class SampleSource(Protocol):
    """The micro-batches of one rank, from where its loader begins."""

    def read(self, number: int) -> tuple[MicroBatch, EncodedBatch]:
        """Micro-batch `number`, whose bytes may be handed to DALI; called from several threads, and again for those
        that were not handed out when one failed."""

    def replace(self, reasons: dict[SampleId, str]) -> None:
        """From now on others stand in these places. DatasetError when that would be too many samples."""

    def close(self) -> None:
        """Stops what runs."""


class PlannedSource:
    """The feed of a line."""

    def __init__(self, line: BatchPlan, start: int, bad: BadSamples):
        """`start` samples of the line have been consumed."""
        self._line, self._start, self._bad = line, start, bad
        self._bad_places: set[SampleId] = set()
        self._reader: ShardReader | MixReader
        dataset = line.dataset
        self._reader = MixReader(dataset, False) if isinstance(dataset, Mix) else ShardReader(dataset, False)
        self._windows = BlockReads(line, start) if line.order.shuffle == "block" else None

    def read(self, number: int) -> tuple[MicroBatch, EncodedBatch]:
        """As `SampleSource.read`."""
        dataset = self._line.dataset
        while True:
            planned = self._line.at(self._start, number, self._bad_places)
            with stage("storage"):
                encoded = self.stored(planned)
            sizes = (column[planned.samples].tolist() for column in (dataset.width, dataset.height))
            refusals = [refusal(memoryview(data), *size) for data, *size in zip(encoded, *sizes, strict=True)]
            if not any(refusals):
                return planned, EncodedBatch.of(encoded, planned.draws)
            self.replace({place: reason for place, reason in zip(planned.places(), refusals, strict=True) if reason})

    def stored(self, planned: MicroBatch) -> list[np.ndarray]:
        """Encoded bytes of each sample, uint8, unchecked."""
        return self._reader.read(planned.samples) if self._windows is None else self._windows.read(planned)

    def replace(self, reasons: dict[SampleId, str]) -> None:
        """As `SampleSource.replace`."""
        self._bad_places |= reasons.keys()
        for (_, sample), reason in reasons.items():
            self._bad.add(BadSample(sample, *self._line.dataset.path_and_key(sample), reason))

    def close(self) -> None:
        """As `SampleSource.close`."""
        if self._windows is not None:
            self._windows.close()
