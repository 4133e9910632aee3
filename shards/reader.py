"""Samples by number: their encoded bytes, as views of memory-mapped shards."""

import mmap
from functools import cache

import google_crc32c
import numpy as np
from jaxtyping import Int64

from shards.dataset import Dataset
from shards.errors import DatasetError


class ShardReader:
    """Reads samples of `dataset` in any order; safe to call from several threads."""

    def __init__(self, dataset: Dataset, check_crc: bool):
        """`check_crc` compares each sample with its CRC32C, 1 GB/s a core at the least: no other check finds flipped
        bits, which decode to garbage without a word."""
        self._dataset, self._check_crc = dataset, check_crc
        self._map = cache(self._open)  # a shard is mapped when it is first needed

    def read(self, samples: Int64[np.ndarray, "b"]) -> list[np.ndarray]:
        """Encoded bytes of each sample, uint8, read-only views.

        Raises:
            DatasetError: a shard that is missing or cut, or a sample that is not what was packed.
        """
        dataset = self._dataset
        columns = (column[samples].tolist() for column in (dataset.shard, dataset.offset, dataset.size, dataset.crc32c))
        return [self._sample(int(sample), *row) for sample, *row in zip(samples, *columns, strict=True)]

    def _sample(self, sample: int, shard: int, offset: int, size: int, crc32c: int) -> np.ndarray:
        data = self._map(shard)[offset : offset + size]
        if self._check_crc and google_crc32c.value(data.tobytes()) != crc32c:
            key = self._dataset.keys(np.array([sample]))[0]
            path = self._dataset.folder / self._dataset.shard_names[shard]
            raise DatasetError(
                f"{path}: sample {key} is not what was packed (CRC32C); `maelstream verify` tells what else is damaged"
            )
        return data

    def _open(self, shard: int) -> np.ndarray:
        path = self._dataset.folder / self._dataset.shard_names[shard]
        expected = self._dataset.manifest["shards"][shard]["bytes"]
        try:
            with path.open("rb") as file:
                mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except (OSError, ValueError) as error:
            raise DatasetError(f"{path} cannot be read ({error}); restore this shard") from None
        if len(mapped) != expected:
            raise DatasetError(f"{path} has {len(mapped)} bytes, {expected} were packed; restore this shard")
        return mapped
