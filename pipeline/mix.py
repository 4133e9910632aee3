"""Several datasets in one stream, each with its weight: which one a place of the stream gets follows from the place.

Places are dealt out evenly: of any first p places a dataset has its share of p to within the number of datasets. Each
dataset is gone through in an order and in epochs of its own, so the stream is as deterministic, and as quickly resumed,
as that of one.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int64

from maelstream.pipeline.order import SampleOrder, Shuffle
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError
from maelstream.shards.reader import ShardReader

_PARTS = 1_000_000  # that weights are rounded to


@dataclass(frozen=True)
class Mix:
    """Several datasets, whose samples are numbered through: those of the second follow the last of the first."""

    datasets: tuple[Dataset, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if min(self.weights) <= 0 or min(self.parts) < 1:
            raise MaelstreamError(
                f"the weights of a mix are {', '.join(map(str, self.weights))}; each must be positive, and at least a "
                "millionth of them all"
            )

    @classmethod
    def open(cls, weights: dict[str, float]) -> "Mix":
        """The datasets in these folders or URIs. DatasetError as `Dataset.open`."""
        return cls(tuple(map(Dataset.open, weights)), tuple(weights.values()))

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """Weights in millionths."""
        edges = np.rint(np.cumsum(self.weights) / np.sum(self.weights) * _PARTS).astype(np.int64)
        return tuple(np.diff(edges, prepend=0).tolist())

    @cached_property
    def starts(self) -> Int64[np.ndarray, "datasets"]:
        """Number of each dataset's first sample, and at the end the number of all."""
        return np.cumsum([0, *map(len, self.datasets)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def folder(self) -> str:
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

    def split(self, samples: Int64[np.ndarray, "b"]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each dataset, which places of `samples` are its own, and their numbers in it."""
        owners = np.searchsorted(self.starts, samples, "right") - 1
        places = [np.flatnonzero(owners == number) for number in range(len(self.datasets))]
        return [(mine, samples[mine] - self.starts[number]) for number, mine in enumerate(places)]

    def siblings(self, sample: int) -> tuple[int, int]:
        """First sample of the dataset that `sample` is in, and the one after its last."""
        owner = int(np.searchsorted(self.starts, sample, "right")) - 1
        return int(self.starts[owner]), int(self.starts[owner + 1])

    def path_and_key(self, sample: int) -> tuple[str, str]:
        """Shard and key of a sample."""
        first, _ = self.siblings(sample)
        return self.datasets[self.starts.tolist().index(first)].path_and_key(sample - first)


class _Column:
    """A column of a mix's index, to be looked up by sample."""

    def __init__(self, mix: Mix, name: str):
        self._mix, self._columns = mix, [getattr(dataset, name) for dataset in mix.datasets]

    def __getitem__(self, samples: Int64[np.ndarray, "b"]) -> np.ndarray:
        found = np.empty(len(samples), self._columns[0].dtype)
        for column, (places, numbers) in zip(self._columns, self._mix.split(samples), strict=True):
            found[places] = column[numbers]
        return found


class MixReader:
    """Reads samples of a mix."""

    def __init__(self, mix: Mix, check_crc: bool):
        self._mix, self._readers = mix, [ShardReader(dataset, check_crc) for dataset in mix.datasets]

    def read(self, samples: Int64[np.ndarray, "b"]) -> list[np.ndarray]:
        """As `ShardReader.read`."""
        found: list[Any] = [None] * len(samples)
        for reader, (places, numbers) in zip(self._readers, self._mix.split(samples), strict=True):
            for place, data in zip(places.tolist(), reader.read(numbers), strict=True):
                found[place] = data
        return found


@dataclass(frozen=True)
class MixOrder:
    """The order of a mix's samples."""

    mix: Mix
    seed: int
    shuffle: Shuffle = "global"

    def of(self, number: int) -> SampleOrder:
        """The order of dataset `number` by itself."""
        return SampleOrder(len(self.mix.datasets[number]), self.seed + number, self.shuffle)

    def of_line(self, line: Int64[np.ndarray, "b"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epoch, position in it and sample for places of the endless line; epochs are each dataset's own."""
        epochs, positions, samples = (np.empty(len(line), np.int64) for _ in range(3))
        left, rest, parts_left = np.arange(len(line)), line.astype(np.int64), _PARTS
        for number, part in enumerate(self.mix.parts):
            before = rest * part // parts_left  # how many of the first `rest` places this dataset has
            mine = (rest + 1) * part // parts_left > before
            places = left[mine]
            epochs[places], positions[places], samples[places] = self.of(number).of_line(before[mine])
            samples[places] += self.mix.starts[number]
            left, rest, parts_left = left[~mine], (rest - before)[~mine], parts_left - part
        return epochs, positions, samples

    def line_of(self, number: int, own: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """Places of the mix's line at which stand these places of dataset `number`'s own line: `of_line` reversed."""
        parts = self.mix.parts
        parts_left = _PARTS - sum(parts[:number])
        line = -(-(own + 1) * parts_left // parts[number]) - 1  # the first place by which it has had `own` + 1
        for part in reversed(parts[:number]):  # those before it in the mix had taken their places out
            line = line * (parts_left + part) // parts_left
            parts_left += part
        return line
