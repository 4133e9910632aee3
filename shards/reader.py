"""Reads the encoded bytes of samples by number, from local shards or from an object store.

A local shard is read, not memory-mapped: if a mapped one is truncated while in use, SIGBUS kills the process. From a
store, samples that are close together in a shard are fetched with one request, and requests run in parallel.
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
from maelstream.shards.index import INDEX_NAME
from maelstream.shards.retry import read_with_retries

_GAP_BYTES = 2**18  # A store sends this much in the time of one more request: 20 ms at 10 MB/s and more.
_RANGE_BYTES = 2**24
_REQUESTS = 16

Read = Callable[[int, int], np.ndarray]
"""Reads bytes of a shard at (offset, size), uint8."""


class ShardReader:
    """Reads samples of `dataset` in any order; safe to call from several threads."""

    def __init__(self, dataset: Dataset, check_crc: bool):
        """`check_crc` compares each sample with its CRC32C, at 1 GB/s per core or more. No other check finds flipped
        bits that decode to garbage without an error."""
        self._dataset, self._check_crc = dataset, check_crc
        # A shard is opened on first use; when too many are open, the least recently used one is closed.
        open_shard = self._open_local if dataset.storage.local else self._open_remote
        self._shard: Callable[[int], Read] = lru_cache(_max_open_shards())(open_shard)
        self._shard_bytes = np.array([shard["bytes"] for shard in dataset.manifest["shards"]], np.uint64)
        self._threads = None if dataset.storage.local else ThreadPoolExecutor(_REQUESTS, "requests")

    def read(self, samples: Int64[np.ndarray, "b"]) -> list[np.ndarray]:
        """Encoded bytes of each sample, uint8, read-only. Reading releases Python's global lock.

        Raises:
            DatasetError: a shard is missing or truncated, or a sample does not match its checksum.
        """
        dataset = self._dataset
        shards, offsets, sizes = (column[samples] for column in (dataset.shard, dataset.offset, dataset.size))
        beyond = np.flatnonzero(offsets + sizes > self._shard_bytes[shards])
        if len(beyond):
            raise DatasetError(
                f"{dataset.folder}/{INDEX_NAME}: sample {samples[beyond[0]]} ends after the end of its shard: the "
                "index is damaged; restore it or pack the dataset again"
            )
        if self._threads is None:
            spans = zip(shards.tolist(), offsets.tolist(), sizes.tolist(), strict=True)
            found = [self._shard(shard)(offset, size) for shard, offset, size in spans]
        else:
            found = self._fetch(shards, offsets.astype(np.int64), sizes.astype(np.int64), self._threads)
        if self._check_crc:
            for sample, data, crc32c in zip(samples, found, dataset.crc32c[samples].tolist(), strict=True):
                if google_crc32c.value(data.tobytes()) != crc32c:
                    path, key = dataset.path_and_key(int(sample))
                    raise DatasetError(
                        f"{path}: sample {key} is not what was packed (CRC32C); `maelstream verify` lists all "
                        "damaged samples"
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
            pass  # waits for all requests and raises the first error
        return found

    def _path(self, shard: int) -> str:
        return f"{self._dataset.folder}/{self._dataset.shard_names[shard]}"

    def _open_local(self, shard: int) -> Read:
        path = Path(self._dataset.storage.path, self._dataset.shard_names[shard])
        try:
            file = path.open("rb", buffering=0)  # closed with its last reference
        except OSError as error:
            raise DatasetError(f"{self._path(shard)} cannot be read ({error}); restore this shard") from None
        self._check_size(shard, os.fstat(file.fileno()).st_size)

        def read(offset: int, size: int) -> np.ndarray:
            try:
                data = os.pread(file.fileno(), size, offset)
            except OSError as error:
                raise StorageError(f"{self._path(shard)} cannot be read ({error.strerror})") from None
            if len(data) < size:
                raise DatasetError(f"{self._path(shard)} was truncated while in use; restore this shard")
            return np.frombuffer(data, np.uint8)

        return lambda offset, size: read_with_retries(lambda: read(offset, size))

    def _open_remote(self, shard: int) -> Read:
        storage, name = self._dataset.storage, self._dataset.shard_names[shard]
        file = storage.open(name)
        self._check_size(shard, file.size())
        return lambda offset, size: np.frombuffer(file.read_at(size, offset), np.uint8)

    def _check_size(self, shard: int, size: int) -> None:
        packed = self._dataset.manifest["shards"][shard]["bytes"]
        if size != packed:
            raise DatasetError(f"{self._path(shard)} has {size} bytes, {packed} were packed; restore this shard")


def _max_open_shards() -> int:
    """How many shards may stay open: half of the files that a process may open."""
    return max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


def coalesced(shards: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Indices into the given arrays, grouped so that one request fetches each group."""
    order = np.lexsort((offsets, shards))
    groups: list[list[int]] = []
    end = start = shard = -1
    for index in order.tolist():
        near = shards[index] == shard and offsets[index] - end <= _GAP_BYTES
        if not (near and offsets[index] + sizes[index] - start <= _RANGE_BYTES):
            groups.append([])
            shard, start = int(shards[index]), int(offsets[index])
        groups[-1].append(index)
        end = int(offsets[index] + sizes[index])
    return [np.array(group) for group in groups]
