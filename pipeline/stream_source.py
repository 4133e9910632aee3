"""Reads the shards of a stream from start to end, with webdataset.

The samples are known only once they arrive, so the guarantees are weaker than those of an indexed dataset. The shards
form an endless sequence, epoch after epoch, each epoch in an order drawn from (seed, epoch). Rank r of n takes every
n-th shard of the sequence, reads it once from its first byte to its last, and shuffles in a buffer. Crops, flips and
masks are drawn from (seed, epoch, sample) as always. A resumed run begins with the shard that on average contains the
position: samples of shards that had been started may come again in that epoch, or not at all.
"""

import contextlib
import io
import os
import random
import re
import select
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np
import webdataset
from webdataset.gopen import Pipe, gopen
from webdataset.tariterators import base_plus_ext, group_by_keys

from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit, MicroBatch, SampleId
from maelstream.pipeline.decode import EncodedBatch
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.sample_source import BadSample, BadSamples
from maelstream.pipeline.stream import Stream
from maelstream.shards.errors import StorageError
from maelstream.shards.inspect import UnusableImageError, inspect
from maelstream.shards.labels import cls_label, json_label, whole_number
from maelstream.shards.layout import in_system_folder
from maelstream.shards.retry import Attempts, connect_timeout_s, read_timeout_s
from maelstream.shards.scan import image_extension, images_among
from maelstream.shards.tars import EXTENDED, EXTENDED_BYTES

_SAMPLE_BYTES = 2**29  # of all members of a sample, which are in memory together
_ZERO_BYTES = 2**26  # between the tars of a shard; a tar has 10 KiB at its end, or is padded to its disk's blocks
_SLOW_BYTES_PER_S = 2**12  # a command or server that delivers less is as good as stuck
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
    Attempts are counted from the last new sample.

    Raises:
        StorageError: every attempt failed.
    """
    yielded, attempts = 0, None
    while True:
        try:
            for number, sample in enumerate(_whole_samples(url)):
                if number >= yielded:
                    yielded, attempts = yielded + 1, None
                    yield sample["__key__"], {name: part for name, part in sample.items() if isinstance(part, bytes)}
            return
        except Exception as error:  # webdataset passes on any exception of its openers and of tarfile
            attempts = attempts or Attempts()
            attempts.wait(StorageError(f"{url} cannot be read ({' '.join(str(error).split())})"))


def _whole_samples(url: str) -> Iterator[dict[str, Any]]:
    """Samples of a shard as webdataset groups them.

    webdataset itself accepts a shard that is damaged or truncated at a member's header as complete, reads only the
    first of joined tars, and checks the exit code of a command only while it reads.

    Raises:
        OSError, or another exception of webdataset: the shard is truncated or cannot be read.
    """
    with contextlib.closing(_open_shard(url)) as shard:
        file = _CheckedTar(shard)
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
        key, key_bytes = "", 0
        while (info := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep all members in memory
            is_meta = re.match(r"__[^/]*__($|/)", info.name)  # of webdataset
            if info.isreg() and not is_meta and not in_system_folder(info.name):
                last_key, key = key, base_plus_ext(info.name)[0]
                key_bytes = info.size + (key_bytes if key == last_key else 0)
                if key_bytes > _SAMPLE_BYTES:
                    raise tarfile.ReadError(f"the members of sample {key} have more than {_SAMPLE_BYTES // 2**20} MiB")
                yield {"fname": info.name, "data": tar.extractfile(info).read(), "__url__": url}


class _StrictHeader(tarfile.TarInfo):
    """A member's header. `ignore_zeros`, which reads joined tars, would also skip damaged headers, and zeros for ever.
    tarfile reads a header's extension as a whole, and a member's size may be anything."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_StrictHeader":
        try:
            info = super().fromtarfile(tar)
        except tarfile.InvalidHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"it is damaged at byte {tar.offset:,}") from None
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros
            tar.zero_blocks = getattr(tar, "zero_blocks", 0) + 1  # type: ignore[attr-defined]
            if tar.zero_blocks * tarfile.BLOCKSIZE > _ZERO_BYTES:  # type: ignore[attr-defined]
                raise tarfile.ReadError(f"it has more than {_ZERO_BYTES // 2**20} MiB of zeros") from None
            raise
        return _sized(info, _SAMPLE_BYTES)

    @classmethod
    def frombuf(cls, buffer: bytes | bytearray, encoding: str, errors: str) -> "_StrictHeader":
        info = super().frombuf(buffer, encoding, errors)
        return _sized(info, EXTENDED_BYTES) if info.type in EXTENDED else info


def _sized(info: _StrictHeader, most: int) -> _StrictHeader:
    if not 0 <= info.size <= most:
        raise tarfile.ReadError(f"member {info.name!a} has {info.size:,} bytes; 0 to {most:,} are possible")
    return info


def _open_shard(url: str) -> "io.BufferedIOBase | _CommandOutput":
    """A shard to read from start to end. OSError if it cannot be opened."""
    if re.match(r"(https?|ftps?|sftp|scp)://", url):
        command = ["curl", "-gNfsSL", "--connect-timeout", f"{connect_timeout_s():g}", url]
        errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by _CommandOutput.close
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        except FileNotFoundError:
            raise OSError("curl is not installed") from None
        return _CommandOutput(process, [0], errors)
    file = gopen(url)
    return _CommandOutput(file.proc, file.ignore_status, None, file) if isinstance(file, Pipe) else file


class _CommandOutput:
    """What a command writes to its stdout. It fails if the command writes too little while `read` waits."""

    def __init__(
        self, process: subprocess.Popen[bytes], good_codes: list[int], errors: IO[bytes] | None, owner: Any = None
    ):
        """`errors` is the file of the command's stderr; `owner` closes the command when it is deleted."""
        self._process, self._good_codes, self._errors, self._owner = process, good_codes, errors, owner
        assert process.stdout is not None
        self._output = process.stdout
        self._limit_s, self._poll = read_timeout_s(), select.poll()
        self._poll.register(self._output, select.POLLIN)
        self._waited_s, self._bytes = 0.0, 0

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end. OSError if the command fails or stands still."""
        parts = []
        while size > 0 and (part := self._part(size)):
            parts.append(part)
            size -= len(part)
        if size > 0:
            self._check_code()
        return b"".join(parts)

    def _part(self, size: int) -> bytes:
        start = time.monotonic()
        if not self._poll.poll(1000 * self._limit_s):
            raise OSError(f"it sent nothing for {self._limit_s:g} s")
        data = os.read(self._output.fileno(), size)
        # Only the time in which this process waits counts: training may take its samples as slowly as it likes.
        self._waited_s, self._bytes = self._waited_s + time.monotonic() - start, self._bytes + len(data)
        if self._waited_s > self._limit_s:
            if self._bytes < self._waited_s * _SLOW_BYTES_PER_S:
                raise OSError(f"it sent only {self._bytes:,} bytes in {self._waited_s:.0f} s")
            self._waited_s, self._bytes = 0.0, 0
        return data

    def _check_code(self) -> None:
        try:
            code = self._process.wait(self._limit_s)
        except subprocess.TimeoutExpired:
            raise OSError("its command closed its output but does not end") from None
        if code not in self._good_codes:
            reason = ""
            if self._errors is not None:
                self._errors.seek(0)
                reason = self._errors.read(1000).decode(errors="replace").strip()
            raise OSError(reason or f"its command ended with exit code {code}")

    def close(self) -> None:
        """Ends the command."""
        self._process.kill()
        self._process.wait()
        self._output.close()
        if self._errors is not None:
            self._errors.close()


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
