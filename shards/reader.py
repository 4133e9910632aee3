"""Samples by number: their encoded bytes, from local shards or from a store.

A local shard is read, not mapped: where a mapped one is cut while it is in use, the process dies of SIGBUS. From a
store, samples that lie close together in a shard come with one request, and requests run side by side.
"""

import os
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import google_crc32c
import numpy as np
from jaxtyping import Int64

from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import DatasetError, StorageError
from maelstream.shards.retry import retried

_GAP_BYTES = 2**18  # what a store sends in the time that one more request takes (20 ms at 10 MB/s and more)
_RANGE_BYTES = 2**24
_REQUESTS = 16

Read = Callable[[int, int], np.ndarray]
"""Bytes of a shard at (offset, size), uint8."""


class ShardReader:
    """Reads samples of `dataset` in any order; safe to call from several threads."""

    def __init__(self, dataset: Dataset, check_crc: bool):
        """`check_crc` compares each sample with its CRC32C, 1 GB/s a core at the least: no other check finds flipped
        bits, which decode to garbage without a word."""
        self._dataset, self._check_crc = dataset, check_crc
        # A shard is opened when it is needed, and the least used one closed where there are too many.
        open_shard = self._local if dataset.storage.local else self._remote
        self._shard: Callable[[int], Read] = lru_cache(_open_shards())(open_shard)
        self._threads = None if dataset.storage.local else ThreadPoolExecutor(_REQUESTS, "requests")

    def read(self, samples: Int64[np.ndarray, "b"]) -> list[np.ndarray]:
        """Encoded bytes of each sample, uint8, read-only. Python's lock is not held meanwhile.

        Raises:
            DatasetError: a shard that is missing or cut, or a sample that is not what was packed.
        """
        dataset = self._dataset
        shards, offsets, sizes = (column[samples] for column in (dataset.shard, dataset.offset, dataset.size))
        if self._threads is None:
            places = zip(shards.tolist(), offsets.tolist(), sizes.tolist(), strict=True)
            found = [self._shard(shard)(offset, size) for shard, offset, size in places]
        else:
            found = self._fetch(shards, offsets.astype(np.int64), sizes.astype(np.int64), self._threads)
        if self._check_crc:
            for sample, data, crc32c in zip(samples, found, dataset.crc32c[samples].tolist(), strict=True):
                if google_crc32c.value(data.tobytes()) != crc32c:
                    path, key = dataset.path_and_key(int(sample))
                    raise DatasetError(
                        f"{path}: sample {key} is not what was packed (CRC32C); `maelstream verify` lists what else is "
                        "damaged"
                    )
        return found

    def _fetch(
        self, shards: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, threads: ThreadPoolExecutor
    ) -> list[np.ndarray]:
        found: list[np.ndarray] = [np.empty(0, np.uint8)] * len(shards)

        def fetch(members: np.ndarray) -> None:
            start = int(offsets[members[0]])
            end = int((offsets + sizes)[members].max())
            data = self._shard(int(shards[members[0]]))(start, end - start)
            for member in members:
                found[member] = data[offsets[member] - start :][: sizes[member]]

        for _ in threads.map(fetch, coalesced(shards, offsets, sizes)):
            pass  # waits for each, and raises what one of them raised
        return found

    def _path(self, shard: int) -> str:
        return f"{self._dataset.folder}/{self._dataset.shard_names[shard]}"

    def _local(self, shard: int) -> Read:
        path = Path(self._dataset.storage.path, self._dataset.shard_names[shard])
        try:
            file = path.open("rb", buffering=0)  # closed when nobody reads from it any more
        except OSError as error:
            raise DatasetError(f"{self._path(shard)} cannot be read ({error}); restore this shard") from None
        self._check_size(shard, os.fstat(file.fileno()).st_size)

        def read(offset: int, size: int) -> np.ndarray:
            try:
                data = os.pread(file.fileno(), size, offset)
            except OSError as error:
                raise StorageError(f"{self._path(shard)} cannot be read ({error.strerror})") from None
            if len(data) < size:
                raise DatasetError(f"{self._path(shard)} was cut while it was in use; restore this shard")
            return np.frombuffer(data, np.uint8)

        return lambda offset, size: retried(lambda: read(offset, size))

    def _remote(self, shard: int) -> Read:
        storage, name = self._dataset.storage, self._dataset.shard_names[shard]
        file = retried(lambda: storage.open(name))
        self._check_size(shard, file.size())

        def read(offset: int, size: int) -> np.ndarray:
            with storage.explained(name):
                return np.frombuffer(file.read_at(size, offset), np.uint8)

        return lambda offset, size: retried(lambda: read(offset, size))

    def _check_size(self, shard: int, held: int) -> None:
        packed = self._dataset.manifest["shards"][shard]["bytes"]
        if held != packed:
            raise DatasetError(f"{self._path(shard)} has {held} bytes, {packed} were packed; restore this shard")


def _open_shards() -> int:
    """How many shards to keep open: half of the files that a process may have."""
    return max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


def coalesced(shards: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Places of samples in the given arrays, grouped so that a group is fetched with one request, in any order."""
    order = np.lexsort((offsets, shards))
    groups: list[list[int]] = []
    end = start = shard = -1
    for place in order.tolist():
        near = shards[place] == shard and offsets[place] - end <= _GAP_BYTES
        if not (near and offsets[place] + sizes[place] - start <= _RANGE_BYTES):
            groups.append([])
            shard, start = int(shards[place]), int(offsets[place])
        groups[-1].append(place)
        end = int(offsets[place] + sizes[place])
    return [np.array(group) for group in groups]
