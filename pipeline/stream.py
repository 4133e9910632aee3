"""Shards that cannot be read at random: URLs, pipes, a WebDataset that nobody has indexed, read through by webdataset.

Which samples there are is known only when they come, so the promises are weaker than those of an indexed dataset. The
shards stand in an endless line, epoch after epoch, each in an order drawn from (seed, epoch); rank r of n takes every
n-th of the line, reads it once from its first byte to its last, and shuffles in a buffer. Crops, flips and masks are
drawn from (seed, epoch, sample) as ever. A resumed run begins with the shard that stands where the samples consumed
come to on average: samples of shards that were begun then may come again in that epoch, or not at all.
"""

import hashlib
import io
import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import braceexpand
import numpy as np
import webdataset
from PIL import Image, UnidentifiedImageError
from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit, MicroBatch, SampleId
from maelstream.pipeline.decode import EncodedBatch
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.sample_source import BadSample, BadSamples
from maelstream.shards.errors import MaelstreamError, StorageError
from maelstream.shards.inspect import MAX_PIXELS, jpeg_size, refusal
from maelstream.shards.scan import IMAGE_EXTENSIONS, json_label

_PAUSES_S = (0.1, 0.4, 1.6, 6.4)
_SHARD_BITS = 32  # a sample's number is its shard's, and behind it its own in the shard
_IN_FLIGHT = 8  # micro-batches beyond those read ahead that DALI may have taken and not handed out


@dataclass(frozen=True)
class Stream:
    """WebDataset shards to be read through."""

    urls: str
    """With braces for several: `https://host/train-{0000..1023}.tar`, `pipe:ssh host cat {00..63}.tar`, a path. What
    begins with http is fetched by curl."""
    samples: int
    """How many they hold, all together: the length of an epoch."""
    shuffle_buffer: int = 1000
    """Samples from which the next is drawn; 1: none is."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.shuffle_buffer < 1:
            raise MaelstreamError(
                f"{self.urls}: samples {self.samples} and shuffle_buffer {self.shuffle_buffer} must be at least 1; "
                "samples is how many its shards hold, which is the length of an epoch"
            )

    @cached_property
    def shards(self) -> list[str]:
        """URLs, braces expanded."""
        return list(braceexpand.braceexpand(self.urls))

    def __len__(self) -> int:
        return self.samples

    @property
    def folder(self) -> str:
        return self.urls

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.urls, self.samples)).encode()).hexdigest()


class StreamSample(NamedTuple):
    """One that may be handed to DALI."""

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
    def place(self) -> SampleId:
        return self.epoch, self.sample


class StreamSource:
    """The feed of a stream; as `maelstream.pipeline.sample_source.SampleSource`."""

    def __init__(
        self,
        stream: Stream,
        order: SampleOrder,
        draws: AugmentSampler,
        batch_split: BatchSplit,
        rank: int,
        start: int,
        prefetch: int,
        bad: BadSamples,
    ):
        """`order` is that of the shards; `start` samples of the stream have been consumed by all ranks."""
        self._stream, self._order, self._draws, self._slices, self._rank = stream, order, draws, batch_split, rank
        self._bad, self._kept = bad, prefetch + _IN_FLIGHT
        self._micro_batches: dict[int, list[StreamSample]] = {}
        self._next = 0
        self._lock = threading.Lock()
        epoch, position = divmod(start, len(stream))
        self._first = epoch * len(stream.shards) + position * len(stream.shards) // len(stream)
        shuffled = webdataset.shuffle(
            stream.shuffle_buffer,
            initial=stream.shuffle_buffer,
            rng=random.Random(f"{order.seed}/{self._first}/{rank}"),
        )
        self._samples = iter(shuffled(self._read_through()))

    def read(self, number: int) -> tuple[MicroBatch, EncodedBatch]:
        """As `SampleSource.read`; of those handed out long ago nothing is kept."""
        with self._lock:
            while self._next <= number:
                first, end = self._slices.bounds(self._rank, self._next % self._slices.micro_batches)
                self._micro_batches[self._next] = [next(self._samples) for _ in range(end - first)]
                self._micro_batches.pop(self._next - self._kept, None)
                self._next += 1
            samples = self._micro_batches[number]
        epochs, numbers = (np.array([getattr(s, name) for s in samples], np.int64) for name in ("epoch", "sample"))
        widths, heights = (np.array([getattr(s, name) for s in samples]) for name in ("width", "height"))
        draws = self._draws.at(epochs, numbers, widths, heights)
        labels = np.array([sample.label for sample in samples], np.int32)
        planned = MicroBatch(numbers, epochs, np.arange(len(samples)), labels, draws)
        return planned, EncodedBatch.of([sample.data for sample in samples], draws)

    def replace(self, reasons: dict[SampleId, str]) -> None:
        """As `SampleSource.replace`: the next good sample of its micro-batch stands in a bad one's place."""
        with self._lock:
            for number in self._micro_batches:
                self._replace(number, reasons)

    def _replace(self, number: int, reasons: dict[SampleId, str]) -> None:
        samples = self._micro_batches[number]
        bad = [sample for sample in samples if sample.place in reasons]
        for sample in bad:
            self._bad.add(BadSample(sample.sample, sample.url, sample.key, reasons[sample.place]))
        good = [sample for sample in samples if sample.place not in reasons]
        if bad and not good:
            raise StorageError(f"{bad[0].url}: none of {len(bad)} samples in a row can be decoded: {bad[0].key}, ...")
        self._micro_batches[number] = [
            good[place % len(good)] if sample.place in reasons else sample for place, sample in enumerate(samples)
        ]

    def close(self) -> None:
        """As `SampleSource.close`; what is read is closed when it is let go."""

    def _read_through(self) -> Iterator[StreamSample]:
        shards, count = self._stream.shards, len(self._stream.shards)
        place = self._first + (self._rank - self._first) % self._slices.world_size
        while True:
            epoch = place // count
            shard = int(self._order.at(np.array([epoch]), np.array([place % count]))[0])
            held = 0
            for number, (key, parts) in enumerate(_patiently(shards[shard])):
                image = next((parts[extension] for extension in IMAGE_EXTENSIONS if extension in parts), None)
                if image is None:
                    continue  # text beside images, say: not what was asked for
                held += 1
                sample = shard << _SHARD_BITS | number
                width, height = _stored_size(image)
                reason = refusal(image, width, height)
                if not 0 < width * height <= MAX_PIXELS:
                    reason = reason or f"{width} x {height} pixels, where 1 to {MAX_PIXELS:,} are taken"
                if reason is not None:
                    self._bad.add(BadSample(sample, shards[shard], key, reason))
                    continue
                data = np.frombuffer(image, np.uint8)
                yield StreamSample(epoch, sample, shards[shard], key, data, width, height, _label(parts))
            if not held:
                raise StorageError(f"{shards[shard]} holds no images; take it out of the stream's urls")
            place += self._slices.world_size


def _patiently(url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members by extension of each sample of a shard. What fails is read again, with growing pauses, from the
    start to where it failed; StorageError when it goes on failing."""
    handed_over = 0
    for pause_s in (*_PAUSES_S, None):
        try:
            for number, sample in enumerate(_whole_samples(url)):
                if number >= handed_over:
                    handed_over += 1
                    yield sample["__key__"], {name: part for name, part in sample.items() if isinstance(part, bytes)}
            return
        except Exception as error:  # webdataset raises what its openers and tarfile raise, of any kind
            if pause_s is None:
                reason = " ".join(str(error.args[0] if error.args else error).split())
                raise StorageError(f"{url} cannot be read ({reason}); asked {len(_PAUSES_S) + 1} times") from None
            time.sleep(pause_s)


def _whole_samples(url: str) -> Iterator[dict[str, Any]]:
    """Samples as webdataset makes them of a shard; OSError, or whatever else webdataset raises, when it is cut.

    webdataset itself takes a shard that breaks off at a member's header for a whole one, and looks at the exit code of
    a command only while it reads.
    """
    file = _ToTheEnd(gopen(url))
    last = None  # may lack a member until the shard is known to be whole
    for sample in group_by_keys(tar_file_expander([{"url": url, "stream": file}])):
        if last is not None:
            yield last
        last = sample
    file.finish()
    if last is not None:
        yield last


class _ToTheEnd:
    """A tar's bytes as they come, and whether they came to its end."""

    def __init__(self, file: Any):
        self._file, self._head, self._tail = file, b"", b""

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._head, self._tail = self._head or data[:512], (self._tail + data)[-512:]
        return data

    def finish(self) -> None:
        """OSError for a command that failed, and for a tar without its end: blocks of zeros."""
        while self.read(2**16):
            pass
        self._file.close()
        uncompressed = self._head[257:262] == b"ustar"  # the others tell by themselves
        if uncompressed and self._tail != bytes(512):
            raise OSError("it is cut off")


def _stored_size(data: bytes) -> tuple[int, int]:
    """Width and height in an image's header; zeros where there is none."""
    if data[:2] == b"\xff\xd8":
        return jpeg_size(data) or (0, 0)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return 0, 0


def _label(parts: dict[str, bytes]) -> int:
    """The number in a sample's `.cls`, or in a known field of its `.json`; -1 where there is none."""
    try:
        text = parts["cls"].decode() if "cls" in parts else json_label(json.loads(parts.get("json", b"{}")), None)
        number = int(text)
    except ValueError:
        return -1
    return number if 0 <= number < 2**31 else -1
