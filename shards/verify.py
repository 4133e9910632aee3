"""Verifies a packed dataset and lists every fault by file and sample.

The manifest holds its own checksum, which is checked when it is opened, and the SHA-256 of every other file. If a shard
does not match, the index, the tar headers and the samples' CRC32Cs show which part is damaged.
"""

import re
import tarfile
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import google_crc32c
import numpy as np

from maelstream.shards.checks import check_images
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import DatasetError
from maelstream.shards.executors import Executor
from maelstream.shards.inspect import Conversion
from maelstream.shards.storage import Storage

_MISSING = "missing"


@dataclass(frozen=True)
class Fault:
    """A damaged, missing or unknown file, or a damaged sample."""

    file: str
    key: str
    """Key of the sample; empty if the fault concerns the whole file."""
    what: str

    def __str__(self) -> str:
        return f"{self.file}{', sample ' + self.key if self.key else ''}: {self.what}"


@dataclass(frozen=True)
class VerifyJob:
    """What a worker needs to verify one shard."""

    storage: Storage
    number: int
    deep: bool
    attempt: int = 0
    """How many workers have died with this job."""


def verify(dataset: Dataset, deep: bool, executor: Executor, on_shard: Callable[[], None]) -> Iterator[Fault]:
    """Yields every fault of the dataset; `deep` also decodes every image. Calls `on_shard` after each shard."""
    present, expected = dataset.storage.names(), set(dataset.shard_names)
    for name in sorted(present - expected):
        if name.endswith(".tar"):
            yield Fault(name, "", "a shard that is not in the dataset")
    for name, sha256 in sorted(dataset.manifest["side_files"].items()):
        if (fault := _digest_fault(dataset.storage, name, sha256)) is not None:
            yield fault
    jobs = [VerifyJob(dataset.storage, number, deep) for number in range(len(dataset.shard_names))]
    with closing(executor.run("maelstream.shards.verify:verify_shard", jobs)) as verified:
        for faults in verified:
            on_shard()
            yield from faults


def verify_shard(job: VerifyJob) -> list[Fault]:
    """Every fault of one shard."""
    dataset = Dataset.open_storage(job.storage, hashed_bytes=0)  # `verify` compares all checksums itself
    shard = dataset.manifest["shards"][job.number]
    fault = _digest_fault(job.storage, shard["name"], shard["sha256"])
    faults = [fault] if fault is not None else []
    if (job.deep or faults) and faults != [Fault(shard["name"], "", _MISSING)]:
        try:
            faults += _sample_faults(dataset, job)
        except DatasetError as error:  # of the index, whose numbers lead nowhere
            faults.append(Fault(shard["name"], "", str(error)))
    return faults


def _digest_fault(storage: Storage, name: str, sha256: str) -> Fault | None:
    try:
        actual = storage.sha256(name)
    except DatasetError as error:
        return Fault(name, "", str(error) if name in storage.names() else _MISSING)
    return None if actual == sha256 else Fault(name, "", "not the bytes that were packed (SHA-256)")


def _sample_faults(dataset: Dataset, job: VerifyJob) -> Iterator[Fault]:
    """Yields the faults of a shard's samples; for `deep`, those of the images after all others."""
    name = dataset.shard_names[job.number]
    with dataset.storage.open(name) as file, dataset.storage.dataset_errors(name):
        if file.size() != (packed := dataset.manifest["shards"][job.number]["bytes"]):
            yield Fault(name, "", f"{file.size()} bytes, {packed} were packed")
        bounds = (bisect_left(dataset.shard, number) for number in (job.number, job.number + 1))
        samples = np.arange(*bounds)  # in shard order
        sound: list[tuple[str, int]] = []
        for sample, key in zip(samples.tolist(), dataset.keys(samples), strict=True):
            offset, size = int(dataset.offset[sample]), int(dataset.size[sample])
            if file.size() < offset + size:
                yield Fault(name, key, "lies beyond the end of the shard")
                continue
            header, encoded = file.read_at(512, offset - 512), file.read_at(size, offset)
            if (what := _header_fault(header, key, size)) is not None:
                yield Fault(name, key, what)
            if google_crc32c.value(encoded) != dataset.crc32c[sample]:
                yield Fault(name, key, "not the bytes that were packed (CRC32C)")
            else:
                sound.append((key, sample))
        if not job.deep:
            return
        images = ((item, file.read_at(int(dataset.size[item[1]]), int(dataset.offset[item[1]]))) for item in sound)
        for (key, sample), checked in check_images(images, Conversion(), isolated=job.attempt > 0):
            if isinstance(checked, str):
                yield Fault(name, key, checked)
            elif (checked[1].width, checked[1].height) != (dataset.width[sample], dataset.height[sample]):
                yield Fault(name, key, f"{checked[1].width} x {checked[1].height} px, the index says otherwise")


def _header_fault(header: bytes, key: str, size: int) -> str | None:
    """What is wrong with the tar header of a sample's image, or None."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"no tar header before it ({error})"
    # In an adopted tar, an extra header before this one may hold a name that is long or not ASCII.
    complete = key.isascii() and len(info.name) < 100
    if info.size != size or (complete and key != _EXTENSIONS.sub("", info.name)):
        return f"the index points at {info.name} of {info.size} bytes"
    return None


_EXTENSIONS = re.compile(r"\.[^/]*$")
