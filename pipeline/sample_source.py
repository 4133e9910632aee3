"""Sources of encoded micro-batches; they report samples that cannot be decoded and replace them.

`PlannedSource` reads datasets whose samples can be read by number. `pipeline/stream_source.py` reads shards that can
only be read from start to end.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import google_crc32c
import numpy as np

from maelstream.pipeline.batch_plan import BatchPlan, MicroBatch, SampleId
from maelstream.pipeline.block_reads import BlockReads
from maelstream.pipeline.decode import EncodedBatch
from maelstream.pipeline.mix import Mix, MixReader
from maelstream.pipeline.tracing import trace_range
from maelstream.shards.errors import DatasetError
from maelstream.shards.forms import is_proven_jpeg, jpeg_frame
from maelstream.shards.inspect import UnusableImageError, inspect
from maelstream.shards.reader import ShardReader

_LISTED = 10  # bad samples in an error message


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be decoded and was replaced."""

    sample: int
    shard: str
    """File or URL."""
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key}: {self.reason}"


class BadSamples:
    """Collects the bad samples that a loader finds; any thread may call it."""

    def __init__(self, max_share: float, size: int, on_bad: Callable[[BadSample], None]):
        """Allows `max_share` of `size` samples to be bad; calls `on_bad` once for each."""
        self._most, self._on_bad = math.ceil(max_share * size), on_bad
        self._found: dict[int, BadSample] = {}
        self._lock = threading.Lock()

    def add(self, bad: BadSample) -> None:
        """Records a bad sample.

        Raises:
            DatasetError: more are bad than allowed; the message lists them.
        """
        with self._lock:
            if bad.sample in self._found:
                return
            self._found[bad.sample] = bad
            self._on_bad(bad)
            if len(self._found) > self._most:
                listed = "; ".join(map(str, list(self._found.values())[:_LISTED]))
                raise DatasetError(
                    f"{len(self._found)} bad samples, max_bad_share allows {self._most}: {listed}; "
                    "run `maelstream verify --deep` to find all damage"
                )


class SampleSource(Protocol):
    """Reads the micro-batches of one rank, counted from where its loader starts."""

    def read(self, number: int) -> tuple[MicroBatch, EncodedBatch]:
        """Micro-batch `number`, whose bytes are safe to pass to DALI: in a batch of 32 or more, one image that makes
        DALI raise can end the process.

        Several threads call it. It is called again for micro-batches that were read but not delivered before `replace`.
        """

    def replace(self, reasons: dict[SampleId, str]) -> None:
        """Replaces these samples from now on, and reports them with their reasons.

        Raises:
            DatasetError: more samples are bad than allowed.
        """

    def close(self) -> None:
        """Stops background threads."""


class PlannedSource:
    """Reads the micro-batches of a plan by sample number."""

    def __init__(self, plan: BatchPlan, start: int, bad: BadSamples):
        """`start` is the first global position."""
        self._plan, self._start, self._bad = plan, start, bad
        self._bad_ids: set[SampleId] = set()
        self._inspected: dict[int, str | None] = {}
        self._reader: ShardReader | MixReader
        dataset = plan.dataset
        self._reader = MixReader(dataset, False) if isinstance(dataset, Mix) else ShardReader(dataset, False)
        self._block_reads = BlockReads(plan, start) if plan.order.shuffle == "block" else None

    def read(self, number: int) -> tuple[MicroBatch, EncodedBatch]:
        """See `SampleSource.read`."""
        dataset = self._plan.dataset
        while True:
            micro_batch = self._plan.micro_batch(self._start, number, self._bad_ids)
            with trace_range("storage"):
                encoded = self.read_encoded(micro_batch)
            checksums = dataset.crc32c[micro_batch.samples].tolist()
            reasons = list(map(self._reason, micro_batch.samples.tolist(), encoded, checksums))
            if not any(reasons):
                return micro_batch, EncodedBatch.of(encoded, micro_batch.augment_params)
            ids = micro_batch.sample_ids()
            self.replace({sample_id: reason for sample_id, reason in zip(ids, reasons, strict=True) if reason})

    def _reason(self, sample: int, encoded: np.ndarray, checksum: int) -> str | None:
        """Why an image must not reach DALI, or None."""
        if google_crc32c.value(encoded) != checksum:
            return "not the bytes that were packed (CRC32C)"
        if self._plan.dataset.dali_checked:
            return None
        # An old version packed it, and decoded it in full, but not with DALI.
        frame = jpeg_frame(data := encoded.tobytes())
        if frame is not None and is_proven_jpeg(frame, data):
            return None
        if sample not in self._inspected:
            try:
                inspect(data)
                self._inspected[sample] = None
            except UnusableImageError as reason:
                self._inspected[sample] = str(reason)
        return self._inspected[sample]

    def read_encoded(self, micro_batch: MicroBatch) -> list[np.ndarray]:
        """Encoded bytes of each sample, uint8, unchecked."""
        if self._block_reads is None:
            return self._reader.read(micro_batch.samples)
        return self._block_reads.read(micro_batch)

    def replace(self, reasons: dict[SampleId, str]) -> None:
        """See `SampleSource.replace`."""
        self._bad_ids |= reasons.keys()
        for (_, sample), reason in reasons.items():
            self._bad.add(BadSample(sample, *self._plan.dataset.path_and_key(sample), reason))

    def close(self) -> None:
        """See `SampleSource.close`."""
        if self._block_reads is not None:
            self._block_reads.close()
