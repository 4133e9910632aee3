"""What is wrong with a packed dataset: every fault by shard, key and kind.

The manifest vouches for itself when it is opened, and by SHA-256 for every other file; where a shard does not fit, the
index, the tar headers and the samples' CRC32Cs tell what of it is damaged.
"""

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import google_crc32c
import numpy as np

from shards.dataset import Dataset
from shards.inspect import Unfit, inspect

_CHUNK_BYTES = 2**22


@dataclass(frozen=True)
class Fault:
    file: str
    key: str
    """Of the sample; empty where the whole file is meant."""
    what: str

    def __str__(self) -> str:
        return f"{self.file}{', sample ' + self.key if self.key else ''}: {self.what}"


def verify(dataset: Dataset, deep: bool, on_shard: Callable[[str], None]) -> Iterator[Fault]:
    """Every fault of the folder; with `deep`, every image is decoded as well. `on_shard` hears of each shard read."""
    expected = set(dataset.shard_names)
    for path in sorted(dataset.folder.glob("*.tar")):
        if path.name not in expected:
            yield Fault(path.name, "", "a shard that the dataset does not know")
    for name, sha256 in sorted(dataset.manifest["side_files"].items()):
        if (fault := _wrong_digest(dataset, name, sha256)) is not None:
            yield fault
    for number, shard in enumerate(dataset.manifest["shards"]):
        on_shard(shard["name"])
        fault = _wrong_digest(dataset, shard["name"], shard["sha256"])
        if fault is not None:
            yield fault
        if deep or (fault is not None and fault.what != "missing"):
            yield from _sample_faults(dataset, number, deep)


def _wrong_digest(dataset: Dataset, name: str, sha256: str) -> Fault | None:
    digest = hashlib.sha256()
    try:
        with (dataset.folder / name).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except FileNotFoundError:
        return Fault(name, "", "missing")
    except OSError as error:
        return Fault(name, "", f"cannot be read ({error.strerror})")
    return None if digest.hexdigest() == sha256 else Fault(name, "", "not the bytes that were packed (SHA-256)")


def _sample_faults(dataset: Dataset, number: int, deep: bool) -> Iterator[Fault]:
    """What of a shard is damaged, sample by sample."""
    name = dataset.shard_names[number]
    data = (dataset.folder / name).read_bytes()
    if len(data) != (packed := dataset.manifest["shards"][number]["bytes"]):
        yield Fault(name, "", f"{len(data)} bytes, {packed} were packed")
    samples = np.arange(*np.searchsorted(dataset.shard, [number, number + 1]))  # samples stand in shard order
    for sample, key in zip(samples, dataset.keys(samples), strict=True):
        offset, size = int(dataset.offset[sample]), int(dataset.size[sample])
        encoded = data[offset : offset + size]
        if len(encoded) < size:
            yield Fault(name, key, "lies behind the end of the shard")
            continue
        try:
            header = tarfile.TarInfo.frombuf(data[offset - 512 : offset], "utf-8", "strict")
            if (header.name.partition(".")[0], header.size) != (key, size):
                yield Fault(name, key, f"the index points at {header.name} of {header.size} bytes")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            yield Fault(name, key, f"no tar header before it ({error})")
        if google_crc32c.value(encoded) != dataset.crc32c[sample]:
            yield Fault(name, key, "not the bytes that were packed (CRC32C)")
        elif deep:
            try:
                info = inspect(encoded)
                if (info.width, info.height) != (dataset.width[sample], dataset.height[sample]):
                    yield Fault(name, key, f"{info.width} x {info.height} px, the index says otherwise")
            except Unfit as reason:
                yield Fault(name, key, str(reason))
