"""Images/s of the loader beside what a user would pick instead, on the same files and cores, in one run.

Every candidate delivers random-resized crops (scale 0.2-1, bicubic, antialias) of 224 px in batches of 64 to the
training process. They take turns, round by round, so that a machine that slows down slows all of them; the median round
counts.

    python benchmarks/loader.py ../shared/imagenet-sample --threads 2
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path

import tyro
from nvidia.dali import Pipeline, fn, types
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, InterpolationMode, PILToTensor, RandomHorizontalFlip, RandomResizedCrop

from pipeline.draws import AugmentDraws, CropConfig
from pipeline.line import Slices
from pipeline.loader import PretrainLoader
from pipeline.order import SampleOrder
from shards.dataset import Dataset
from shards.executors import Local
from shards.pack import pack
from shards.plan import PackOptions

BATCH, SIZE = 64, (224, 224)


@dataclass(frozen=True)
class Options:
    src: tyro.conf.Positional[Path]
    """A folder of images, one folder a class."""
    threads: int = 2
    """Decoding threads, or worker processes."""
    rounds: int = 5
    batches: int = 10
    """Batches a round and candidate."""


@contextmanager
def maelstream(dataset: Dataset, threads: int) -> Iterator[Iterator[object]]:
    """This project's loader."""
    order, draws = SampleOrder(len(dataset), 0), AugmentDraws(0, CropConfig())
    with PretrainLoader(dataset, order, draws, SIZE, Slices(BATCH, 1, 1), 0, threads, prefetch=4) as loader:
        yield iter(loader)


@contextmanager
def stock_dali(dataset: Dataset, threads: int) -> Iterator[Iterator[object]]:
    """DALI's own webdataset reader, random crop and resize on the CPU."""
    paths = [Path(dataset.folder, name) for name in dataset.shard_names]
    pipeline = Pipeline(BATCH, threads, device_id=None, prefetch_queue_depth=2)
    with pipeline:
        jpg = fn.readers.webdataset(
            paths=[str(path) for path in paths],
            index_paths=[str(path.with_suffix(".idx")) for path in paths],
            ext=["jpg"],
            random_shuffle=True,
            initial_fill=256,
        )
        window = fn.decoders.image_random_crop(jpg, random_area=(0.2, 1.0), adjust_orientation=False)
        image = fn.resize(window, size=SIZE, interp_type=types.INTERP_CUBIC, antialias=True)
        pipeline.set_outputs(fn.flip(image, horizontal=fn.random.coin_flip()))
    pipeline.build()
    yield (pipeline.run() for _ in repeat(None))


@contextmanager
def torchvision_loader(src: Path, threads: int) -> Iterator[Iterator[object]]:
    """ImageFolder and PIL in `threads` worker processes."""
    crop = RandomResizedCrop(SIZE, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC)
    images = ImageFolder(str(src), Compose([crop, RandomHorizontalFlip(), PILToTensor()]))
    loader = DataLoader(images, BATCH, shuffle=True, num_workers=threads, drop_last=True, persistent_workers=True)
    yield chain.from_iterable(repeat(loader))


def rate(batches: Iterator[object], count: int) -> float:
    """Images/s over `count` batches, once past the start and what was made ahead meanwhile."""
    for _ in islice(batches, 8):
        pass
    began = time.perf_counter()
    for _ in islice(batches, count):
        pass
    return count * BATCH / (time.perf_counter() - began)


def main() -> None:
    """Prints one table."""
    options = tyro.cli(Options)
    with tempfile.TemporaryDirectory() as folder:
        shards, pack_options = Path(folder) / "shards", PackOptions("bench", "train", 2**26, 0)
        pack(str(options.src), str(shards), pack_options, Local(options.threads), lambda _: None)
        dataset = Dataset.open(shards)
        candidates: dict[str, Callable[[], AbstractContextManager[Iterator[object]]]] = {
            "maelstream": lambda: maelstream(dataset, options.threads),
            "DALI's own reader and CPU resize": lambda: stock_dali(dataset, options.threads),
            "torchvision DataLoader": lambda: torchvision_loader(options.src, options.threads),
        }
        rates: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(options.rounds):
            for name, start in candidates.items():
                with start() as batches:
                    rates[name].append(rate(batches, options.batches))
    table = Table("loader", "images/s", "maelstream is", title=f"{len(dataset)} images, {options.threads} threads")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, median in medians.items():
        table.add_row(name, f"{median:,.0f}", f"{medians['maelstream'] / median:.2f}x")
    Console().print(table)


if __name__ == "__main__":
    main()
