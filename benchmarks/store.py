"""Compares the loader's rate with block shuffle from a store (20 ms per request) and from the local disk, in one run.

The store is the local disk behind a wrapper that waits before each read; requests run in parallel, as over a network.
A global shuffle from the same store is measured for comparison.

    python -m benchmarks.store --data ../shared/imagenet-sample
"""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.loaders import rate
from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.config import CropConfig, LoaderConfig, Shuffle
from maelstream.pipeline.loader import ImageLoader
from maelstream.pipeline.order import SampleOrder
from maelstream.shards.dataset import Dataset
from maelstream.shards.executors import Local
from maelstream.shards.pack import pack
from maelstream.shards.plan import PackOptions
from maelstream.shards.storage import Storage

BATCH, SIZE = 64, (224, 224)


@dataclass(frozen=True)
class SlowStorage(Storage):
    """A local folder that behaves as a store: each read of a shard waits `delay_s` first."""

    delay_s: float
    requests: list[int] = field(default_factory=lambda: [0])
    """Number of requests so far, in a list of one, because the class is frozen."""

    @classmethod
    def over(cls, dataset: Dataset, delay_s: float) -> "SlowStorage":
        """The folder of `dataset` as a slow store."""
        storage = dataset.storage
        return cls(storage.filesystem, storage.path, storage.shown, delay_s)

    @property
    def local(self) -> bool:
        return False

    def open(self, name: str) -> Any:
        file = super().open(name)
        return _SlowFile(self, file) if name.endswith(".tar") else file


@dataclass(frozen=True)
class _SlowFile:
    store: SlowStorage
    file: Any

    def size(self) -> int:
        return self.file.size()

    def read_at(self, size: int, offset: int) -> bytes:
        self.store.requests[0] += 1
        time.sleep(self.store.delay_s)
        return self.file.read_at(size, offset)


@dataclass(frozen=True)
class Options:
    """Compare the loader on a store with the loader on the local disk."""

    data: Path = Path("../shared/imagenet-sample")
    """A folder that holds one folder of images per class."""
    delay_s: float = 0.02
    """Seconds per request."""
    threads: int = 2
    """Threads of the loader, and processes that pack."""
    rounds: int = 5
    """Number of rounds."""
    repeat: int = 10
    """How many times each image is packed, so that there are several superblocks."""
    json: Path | None = None
    """Also write the medians to this file: images/s by name."""


def main() -> None:
    """Measures the rates and prints one table."""
    options = tyro.cli(Options)
    with tempfile.TemporaryDirectory() as folder:
        src = Path(folder) / "src"
        for path in sorted(options.data.glob("*/*")):
            (src / path.parent.name).mkdir(parents=True)
            for number in range(options.repeat):
                (src / path.parent.name / f"{number}-{path.name}").symlink_to(path.resolve())
        shards, pack_options = str(Path(folder) / "shards"), PackOptions("b", "train", 2**26, 0)
        pack(str(src), shards, pack_options, Local(options.threads), lambda _: None)
        disk = Dataset.open(shards)
        store = Dataset.open_storage(SlowStorage.over(disk, options.delay_s))
        candidates: dict[str, tuple[Dataset, Shuffle]] = {
            "block shuffle, local disk": (disk, "block"),
            "block shuffle, store": (store, "block"),
            "global shuffle, store": (store, "global"),
        }
        rates: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(options.rounds):
            for name, (dataset, shuffle) in candidates.items():
                order, augment_sampler = SampleOrder(len(dataset), 0, shuffle), AugmentSampler(0, CropConfig(), SIZE)
                batch_split = BatchSplit(BATCH, 1, 1)
                config = LoaderConfig(options.threads)
                with ImageLoader(dataset, order, augment_sampler, batch_split, config=config) as loader:
                    rates[name].append(rate(iter(loader), 80))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    table = Table("", "images/s", "share of local disk", title=f"{len(disk):,} images, {options.delay_s * 1e3:.0f} ms")
    for name, median in medians.items():
        table.add_row(name, f"{median:,.0f}", f"{median / medians['block shuffle, local disk']:.0%}")
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
