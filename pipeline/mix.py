"""A mix of datasets: several datasets in one sequence of samples, each with a weight.

The global position alone decides which dataset provides the sample. Datasets alternate evenly: among the first p
positions, each dataset has its share of p to within the number of datasets. Each dataset has its own order and its own
epochs, so a mix is as deterministic as a single dataset and resumes as quickly.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int64

from maelstream.pipeline.config import Shuffle
from maelstream.pipeline.order import SampleOrder
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError
from maelstream.shards.reader import ShardReader

_PARTS = 1_000_000  # weights are rounded to whole parts of this many


@dataclass(frozen=True)
class Mix:
    """Several datasets with consecutive sample numbers: the second dataset's follow those of the first."""

    datasets: tuple[Dataset, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if min(self.weights) <= 0 or min(self.parts) < 1:
            raise MaelstreamError(
                f"the weights of a mix are {', '.join(map(str, self.weights))}; each must be positive and at least a "
                "millionth of their sum"
            )

    @classmethod
    def open(cls, weights: dict[str, float]) -> "Mix":
        """Opens datasets by folder or URI, the keys of `weights`. Raises what `Dataset.open` raises."""
        return cls(tuple(map(Dataset.open, weights)), tuple(weights.values()))

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """Weights in millionths."""
        edges = np.rint(np.cumsum(self.weights) / np.sum(self.weights) * _PARTS).astype(np.int64)
        return tuple(np.diff(edges, prepend=0).tolist())

    @cached_property
    def starts(self) -> Int64[np.ndarray, "datasets"]:
        """Number of each dataset's first sample, followed by the total number of samples."""
        return np.cumsum([0, *map(len, self.datasets)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def folder(self) -> str:
        """All folders or URIs, for messages."""
        return " + ".join(dataset.folder for dataset in self.datasets)

    @property
    def fingerprint(self) -> str:
        text = repr([(dataset.fingerprint, part) for dataset, part in zip(self.datasets, self.parts, strict=True)])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def width(self) -> "_Column":
        return _Column(self, "width")

    @property
    def height(self) -> "_Column":
        return _Column(self, "height")

    @property
    def label(self) -> "_Column":
        return _Column(self, "label")

    @property
    def crc32c(self) -> "_Column":
        return _Column(self, "crc32c")

    @property
    def dali_checked(self) -> bool:
        """Whether packing made sure that DALI decodes every image of every dataset."""
        return all(dataset.dali_checked for dataset in self.datasets)

    def split(self, samples: Int64[np.ndarray, "b"]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each dataset: indices into `samples` of the samples it provides, and their numbers in that dataset."""
        owners = np.searchsorted(self.starts, samples, "right") - 1
        indices = [np.flatnonzero(owners == number) for number in range(len(self.datasets))]
        return [(own, samples[own] - self.starts[number]) for number, own in enumerate(indices)]

    def siblings(self, sample: int) -> tuple[int, int]:
        """First sample of the dataset that contains `sample`, and the one after its last."""
        owner = int(np.searchsorted(self.starts, sample, "right")) - 1
        return int(self.starts[owner]), int(self.starts[owner + 1])

    def path_and_key(self, sample: int) -> tuple[str, str]:
        """Shard and key of a sample."""
        first, _ = self.siblings(sample)
        return self.datasets[self.starts.tolist().index(first)].path_and_key(sample - first)


class _Column:
    """A column of a mix's index, looked up by sample number."""

    def __init__(self, mix: Mix, name: str):
        self._mix, self._columns = mix, [getattr(dataset, name) for dataset in mix.datasets]

    def __getitem__(self, samples: Int64[np.ndarray, "b"]) -> np.ndarray:
        found = np.empty(len(samples), self._columns[0].dtype)
        for column, (indices, numbers) in zip(self._columns, self._mix.split(samples), strict=True):
            found[indices] = column[numbers]
        return found


class MixReader:
    """Reads encoded samples of a mix."""

    def __init__(self, mix: Mix, check_crc: bool):
        self._mix, self._readers = mix, [ShardReader(dataset, check_crc) for dataset in mix.datasets]

    def read(self, samples: Int64[np.ndarray, "b"]) -> list[np.ndarray]:
        """Encoded bytes of each sample, as `ShardReader.read` returns them."""
        found: list[Any] = [None] * len(samples)
        for reader, (indices, numbers) in zip(self._readers, self._mix.split(samples), strict=True):
            for index, data in zip(indices.tolist(), reader.read(numbers), strict=True):
                found[index] = data
        return found


@dataclass(frozen=True)
class MixOrder:
    """The order of a mix's samples."""

    mix: Mix
    seed: int
    shuffle: Shuffle = "global"

    def dataset_order(self, number: int) -> SampleOrder:
        """The order of dataset `number` on its own."""
        return SampleOrder(len(self.mix.datasets[number]), self.seed + number, self.shuffle)

    def lookup(self, global_positions: Int64[np.ndarray, "b"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epochs, positions in them, and samples at global positions of the mix; three int64 arrays (b,).

        Epochs and positions are those of the dataset that provides the sample.
        """
        epochs, positions, samples = (np.empty(len(global_positions), np.int64) for _ in range(3))
        # Positions that no dataset has filled yet: their indices in the result, and their numbers among themselves.
        left, rest, parts_left = np.arange(len(global_positions)), global_positions.astype(np.int64), _PARTS
        for number, part in enumerate(self.mix.parts):
            before = rest * part // parts_left  # how many of the first `rest` positions this dataset fills
            own = (rest + 1) * part // parts_left > before
            indices = left[own]
            epochs[indices], positions[indices], samples[indices] = self.dataset_order(number).lookup(before[own])
            samples[indices] += self.mix.starts[number]
            left, rest, parts_left = left[~own], (rest - before)[~own], parts_left - part
        return epochs, positions, samples

    def mix_positions(self, number: int, dataset_positions: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """Global positions of the mix for global positions of dataset `number` alone; the inverse of `lookup`."""
        parts = self.mix.parts
        parts_left = _PARTS - sum(parts[:number])
        # The first position by which the dataset has provided `dataset_positions` + 1 samples.
        found = -(-(dataset_positions + 1) * parts_left // parts[number]) - 1
        for part in reversed(parts[:number]):  # the datasets before it in the mix have filled their positions
            found = found * (parts_left + part) // parts_left
            parts_left += part
        return found
