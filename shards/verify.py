"""What is wrong with a packed dataset: every fault by shard, key and kind.

The manifest vouches for itself when it is opened, and by SHA-256 for every other file; where a shard does not fit, the
index, the tar headers and the samples' CRC32Cs show which part is damaged.
"""

import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import google_crc32c
import numpy as np

from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import DatasetError
from maelstream.shards.executors import Executor
from maelstream.shards.inspect import Unfit, inspect
from maelstream.shards.storage import Storage

_MISSING = "missing"


@dataclass(frozen=True)
class Fault:
    file: str
    key: str
    """Key of the sample; empty if the fault is of the whole file."""
    what: str

    def __str__(self) -> str:
        return f"{self.file}{', sample ' + self.key if self.key else ''}: {self.what}"


@dataclass(frozen=True)
class VerifyJob:
    """All that a worker needs to verify one shard."""

    storage: Storage
    number: int
    deep: bool


def verify(dataset: Dataset, deep: bool, executor: Executor, on_shard: Callable[[], None]) -> Iterator[Fault]:
    """Every fault of the folder; with `deep`, every image is decoded as well. `on_shard` is called after each shard."""
    present, expected = dataset.storage.names(), set(dataset.shard_names)
    for name in sorted(present - expected):
        if name.endswith(".tar"):
            yield Fault(name, "", "a shard that the dataset does not know")
    for name, sha256 in sorted(dataset.manifest["side_files"].items()):
        if (fault := _wrong_digest(dataset.storage, name, sha256)) is not None:
            yield fault
    jobs = [VerifyJob(dataset.storage, number, deep) for number in range(len(dataset.shard_names))]
    with closing(executor.run("maelstream.shards.verify:verify_shard", jobs)) as verified:
        for faults in verified:
            on_shard()
            yield from faults


def verify_shard(job: VerifyJob) -> list[Fault]:
    """Every fault of one shard."""
    dataset = Dataset.open_storage(job.storage)
    shard = dataset.manifest["shards"][job.number]
    fault = _wrong_digest(job.storage, shard["name"], shard["sha256"])
    faults = [fault] if fault is not None else []
    if (job.deep or faults) and faults != [Fault(shard["name"], "", _MISSING)]:
        faults += _sample_faults(dataset, job.number, job.deep)
    return faults


def _wrong_digest(storage: Storage, name: str, sha256: str) -> Fault | None:
    try:
        held = storage.sha256(name)
    except DatasetError as error:
        return Fault(name, "", str(error) if name in storage.names() else _MISSING)
    return None if held == sha256 else Fault(name, "", "not the bytes that were packed (SHA-256)")


def _sample_faults(dataset: Dataset, number: int, deep: bool) -> Iterator[Fault]:
    """What of a shard is damaged, sample by sample."""
    name = dataset.shard_names[number]
    with dataset.storage.open(name) as file, dataset.storage.explained(name):
        if file.size() != (packed := dataset.manifest["shards"][number]["bytes"]):
            yield Fault(name, "", f"{file.size()} bytes, {packed} were packed")
        samples = np.arange(*np.searchsorted(dataset.shard, [number, number + 1]))  # samples stand in shard order
        for sample, key in zip(samples, dataset.keys(samples), strict=True):
            offset, size = int(dataset.offset[sample]), int(dataset.size[sample])
            if file.size() < offset + size:
                yield Fault(name, key, "lies behind the end of the shard")
                continue
            header, encoded = file.read_at(512, offset - 512), file.read_at(size, offset)
            if (what := _wrong_header(header, key, size)) is not None:
                yield Fault(name, key, what)
            if google_crc32c.value(encoded) != dataset.crc32c[sample]:
                yield Fault(name, key, "not the bytes that were packed (CRC32C)")
            elif deep:
                try:
                    info = inspect(encoded)
                    if (info.width, info.height) != (dataset.width[sample], dataset.height[sample]):
                        yield Fault(name, key, f"{info.width} x {info.height} px, the index says otherwise")
                except Unfit as reason:
                    yield Fault(name, key, str(reason))


def _wrong_header(header: bytes, key: str, size: int) -> str | None:
    """What is wrong with the tar header of a sample's image."""
    try:
        held = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"no tar header before it ({error})"
    # An adopted tar may keep the end of a long name, or one beyond ASCII, in a header of its own before this one.
    whole = key.isascii() and len(held.name) < 100
    if held.size != size or (whole and key != _EXTENSIONS.sub("", held.name)):
        return f"the index points at {held.name} of {held.size} bytes"
    return None


_EXTENSIONS = re.compile(r"\.[^/]*$")
