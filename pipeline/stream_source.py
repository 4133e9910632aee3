"""Reads the shards of a stream from start to end, with webdataset.

The samples are known only once they arrive, so the guarantees are weaker than those of an indexed dataset. The shards
form an endless sequence, epoch after epoch, each epoch in an order drawn from (seed, epoch). Rank r of n takes every
n-th shard of the sequence, reads it once from its first byte to its last, and shuffles in a buffer. Crops, flips and
masks are drawn from (seed, epoch, sample) as always. A resumed run begins with the shard that on average contains the
position: samples of shards that had been started may come again in that epoch, or not at all.
"""

import random
import re
import tarfile
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import webdataset
from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys

from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit, MicroBatch, SampleId
from maelstream.pipeline.decode import EncodedBatch
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.sample_source import BadSample, BadSamples
from maelstream.pipeline.stream import Stream
from maelstream.shards import retry
from maelstream.shards.errors import StorageError
from maelstream.shards.inspect import UnusableImageError, inspect
from maelstream.shards.labels import cls_label, json_label, whole_number
from maelstream.shards.layout import in_system_folder
from maelstream.shards.scan import image_extension, images_among

_SHARD_BITS = 32  # a sample's number is its shard's number shifted by this, plus its own number in the shard
_IN_FLIGHT = 8  # micro-batches beyond the prefetched ones that DALI may have pulled and not yet returned


class StreamSample(NamedTuple):
    """A sample that is safe to pass to DALI."""

    epoch: int
    sample: int
    url: str
    key: str
    data: np.ndarray
    """File bytes, uint8."""
    width: int
    height: int
    label: int

    @property
    def sample_id(self) -> SampleId:
        return self.epoch, self.sample


class StreamSource:
    """Reads the micro-batches of a stream; a `SampleSource` (`pipeline/sample_source.py`)."""

    def __init__(
        self,
        stream: Stream,
        order: SampleOrder,
        augment_sampler: AugmentSampler,
        batch_split: BatchSplit,
        rank: int,
        start: int,
        prefetch: int,
        bad: BadSamples,
    ):
        """`order` is that of the shards; `start` is the first global position, over all ranks."""
        self._stream, self._order, self._augment_sampler = stream, order, augment_sampler
        self._batch_split, self._rank = batch_split, rank
        self._bad, self._kept = bad, prefetch + _IN_FLIGHT
        self._micro_batches: dict[int, list[StreamSample]] = {}
        self._next_number = 0
        self._lock = threading.Lock()
        epoch, position = divmod(start, len(stream))
        self._first_shard = epoch * len(stream.shards) + position * len(stream.shards) // len(stream)
        shuffled = webdataset.shuffle(
            stream.shuffle_buffer,
            initial=stream.shuffle_buffer,
            rng=random.Random(f"{order.seed}/{self._first_shard}/{rank}"),
        )
        self._samples = iter(shuffled(self._shard_samples()))

    def read(self, number: int) -> tuple[MicroBatch, EncodedBatch]:
        """See `SampleSource.read`; only recent micro-batches are kept."""
        with self._lock:
            while self._next_number <= number:
                micro_batch = self._next_number % self._batch_split.micro_batches
                first, end = self._batch_split.bounds(self._rank, micro_batch)
                self._micro_batches[self._next_number] = [next(self._samples) for _ in range(end - first)]
                self._micro_batches.pop(self._next_number - self._kept, None)
                self._next_number += 1
            samples = self._micro_batches[number]
        epochs, numbers = (np.array([getattr(s, name) for s in samples], np.int64) for name in ("epoch", "sample"))
        widths, heights = (np.array([getattr(s, name) for s in samples]) for name in ("width", "height"))
        augment_params = self._augment_sampler.at(epochs, numbers, widths, heights)
        labels = np.array([sample.label for sample in samples], np.int32)
        batch = MicroBatch(numbers, epochs, np.arange(len(samples)), labels, augment_params)
        return batch, EncodedBatch.of([sample.data for sample in samples], augment_params)

    def replace(self, reasons: dict[SampleId, str]) -> None:
        """See `SampleSource.replace`; another good sample of the same micro-batch replaces a bad one."""
        with self._lock:
            for number in self._micro_batches:
                self._replace(number, reasons)

    def _replace(self, number: int, reasons: dict[SampleId, str]) -> None:
        samples = self._micro_batches[number]
        bad = [sample for sample in samples if sample.sample_id in reasons]
        for sample in bad:
            self._bad.add(BadSample(sample.sample, sample.url, sample.key, reasons[sample.sample_id]))
        good = [sample for sample in samples if sample.sample_id not in reasons]
        if bad and not good:
            raise StorageError(f"{bad[0].url}: {len(bad)} samples in a row cannot be decoded: {bad[0].key}, ...")
        self._micro_batches[number] = [
            good[index % len(good)] if sample.sample_id in reasons else sample for index, sample in enumerate(samples)
        ]

    def close(self) -> None:
        """See `SampleSource.close`; there are no threads, and the open shard is closed with this object."""

    def _shard_samples(self) -> Iterator[StreamSample]:
        """Good samples of this rank's shards, in order, without end."""
        shards, count = self._stream.shards, len(self._stream.shards)
        position = self._first_shard + (self._rank - self._first_shard) % self._batch_split.world_size
        while True:
            epoch = position // count
            shard = int(self._order.at(np.array([epoch]), np.array([position % count]))[0])
            images = 0
            for number, (key, parts) in enumerate(_read_shard(shards[shard])):
                extension, sample = image_extension(parts), shard << _SHARD_BITS | number
                if extension is None:
                    if several := images_among(parts):
                        reason = f"several images ({', '.join(several[:4])}), and none is just jpg or png"
                        self._bad.add(BadSample(sample, shards[shard], key, reason))
                    continue  # a sample without an image, such as text
                images, image = images + 1, parts[extension]
                try:
                    info = inspect(image)  # there is no index whose checksum would prove it
                except UnusableImageError as reason:
                    self._bad.add(BadSample(sample, shards[shard], key, str(reason)))
                    continue
                data = np.frombuffer(image, np.uint8)
                yield StreamSample(epoch, sample, shards[shard], key, data, info.width, info.height, _label(parts))
            if not images:
                raise StorageError(f"{shards[shard]} holds no images; take it out of the stream's urls")
            position += self._batch_split.world_size


def _read_shard(url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key, and members by extension, of each sample of a shard.

    After a failure, the shard is read again from its start, with growing pauses; samples already yielded are skipped.

    Raises:
        StorageError: every attempt failed.
    """
    yielded = 0
    for pause_s in (*retry.PAUSES_S, None):
        try:
            for number, sample in enumerate(_whole_samples(url)):
                if number >= yielded:
                    yielded += 1
                    yield sample["__key__"], {name: part for name, part in sample.items() if isinstance(part, bytes)}
            return
        except Exception as error:  # webdataset passes on any exception of its openers and of tarfile
            if pause_s is None:
                reason = " ".join(str(error.args[0] if error.args else error).split())
                raise StorageError(f"{url} cannot be read ({reason}); tried {len(retry.PAUSES_S) + 1} times") from None
            time.sleep(pause_s)


def _whole_samples(url: str) -> Iterator[dict[str, Any]]:
    """Samples of a shard as webdataset groups them.

    webdataset itself accepts a shard that is damaged or truncated at a member's header as complete, reads only the
    first of joined tars, and checks the exit code of a command only while it reads.

    Raises:
        OSError, or another exception of webdataset: the shard is truncated or cannot be read.
    """
    file = _CheckedTar(gopen(url))
    last = None  # may lack a member until the shard is known to be complete
    for sample in group_by_keys(_members(url, file)):
        if last is not None:
            yield last
        last = sample
    file.finish()
    if last is not None:
        yield last


def _members(url: str, file: "_CheckedTar") -> Iterator[dict[str, Any]]:
    with tarfile.open(fileobj=file, mode="r|*", ignore_zeros=True, tarinfo=_StrictHeader) as tar:  # type: ignore[call-overload]
        while (info := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep all members in memory
            is_meta = re.match(r"__[^/]*__($|/)", info.name)  # of webdataset
            if info.isreg() and not is_meta and not in_system_folder(info.name):
                yield {"fname": info.name, "data": tar.extractfile(info).read(), "__url__": url}


class _StrictHeader(tarfile.TarInfo):
    """A member's header. `ignore_zeros`, which reads joined tars, would also skip damaged headers."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_StrictHeader":
        try:
            return super().fromtarfile(tar)
        except tarfile.InvalidHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"it is damaged at byte {tar.offset:,}") from None


class _CheckedTar:
    """Passes on the bytes of a tar and checks that they reach its end."""

    def __init__(self, file: Any):
        self._file, self._head, self._tail = file, b"", b""

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._head, self._tail = self._head or data[:512], (self._tail + data)[-512:]
        return data

    def finish(self) -> None:
        """Reads the rest. Raises OSError if the command failed, or if the tar lacks its end: blocks of zeros."""
        while self.read(2**16):
            pass
        self._file.close()
        uncompressed = self._head[257:262] == b"ustar"  # decompression detects truncation itself
        if uncompressed and self._tail != bytes(512):
            raise OSError("it is truncated")


def _label(parts: dict[str, bytes]) -> int:
    """The number in a sample's `.cls`, or in a known field of its `.json`; -1 if there is none."""
    try:
        text = cls_label(parts["cls"]) if "cls" in parts else json_label(parts.get("json", b"{}"), None)
    except ValueError:
        return -1
    number = whole_number(text)
    return number if number is not None and 0 <= number < 2**31 else -1
