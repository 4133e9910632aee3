"""Images/s of this loader and of the loaders that a user could choose instead, on the same files and cores.

Every candidate delivers random-resized crops (scale 0.2-1, bicubic, antialias, flip) of 224 px in batches of 64 to the
training process: normalised float32, or bytes if its name says uint8. The candidates run in turn, round by round, so a
machine that slows down slows all of them; the median round counts. The upper limit is DALI's window decode
alone, on the same windows: it resizes and delivers nothing. A candidate that is not installed or fails is reported and
left out.

    python benchmarks/loaders.py --data ../shared/imagenet-sample
"""

import importlib.util
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain, count, islice, repeat
from pathlib import Path

import numpy as np
import tyro
import webdataset
from nvidia.dali import Pipeline, fn, types
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms
from torchvision.datasets import ImageFolder

from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.config import CropConfig, LoaderConfig
from maelstream.pipeline.loader import ImageLoader
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.output import Output
from maelstream.shards.dataset import Dataset
from maelstream.shards.executors import Local
from maelstream.shards.pack import pack
from maelstream.shards.plan import PackOptions
from maelstream.shards.reader import ShardReader

BATCH, SIZE = 64, (224, 224)
LIMIT = "DALI's window decode alone"


@dataclass(frozen=True)
class Options:
    data: Path = Path("../shared/imagenet-sample")
    """A folder of images with one folder per class."""
    threads: int = 2
    """Decoding threads, or worker processes."""
    rounds: int = 5
    batches: int = 15
    """Batches per round and candidate."""
    json: Path | None = None
    """Also write the median images/s to this file, by name."""


@dataclass(frozen=True)
class Data:
    """The same images as files and as a packed dataset."""

    files: Path
    dataset: Dataset
    threads: int


def augmentation() -> transforms.Compose:
    """torchvision's augmentation with the settings of MAE's own code."""
    crop = transforms.RandomResizedCrop(
        SIZE, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC, antialias=True
    )
    normalise = transforms.Normalize(Output().mean, Output().std)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise])


@contextmanager
def maelstream(data: Data, output: Output) -> Iterator[Iterator[object]]:
    """This project's loader."""
    order, sampler = SampleOrder(len(data.dataset), 0), AugmentSampler(0, CropConfig(), SIZE)
    batch_split, config = BatchSplit(BATCH, 1, 1), LoaderConfig(data.threads)
    with ImageLoader(data.dataset, order, sampler, batch_split, config=config, output=output) as loader:
        yield iter(loader)


@contextmanager
def stock_dali(data: Data) -> Iterator[Iterator[object]]:
    """DALI's own webdataset reader, random crop, resize and normalisation on the CPU."""
    paths = [Path(data.dataset.folder, name) for name in data.dataset.shard_names]
    pipeline = Pipeline(BATCH, data.threads, device_id=None, prefetch_queue_depth=2)
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
        mean, std = ([255 * value for value in values] for values in (Output().mean, Output().std))
        mirror = fn.random.coin_flip()
        pipeline.set_outputs(fn.crop_mirror_normalize(image, mirror=mirror, mean=mean, std=std, output_layout="CHW"))
    pipeline.build()
    yield (pipeline.run() for _ in repeat(None))


@contextmanager
def window_decode(data: Data) -> Iterator[Iterator[object]]:
    """DALI decodes windows from bytes in memory; nothing else."""
    dataset = data.dataset
    samples = np.arange(len(dataset))
    encoded = [view.copy() for view in ShardReader(dataset, check_crc=False).read(samples)]
    params = AugmentSampler(0, CropConfig(), SIZE).at(
        np.zeros_like(samples), samples, dataset.width[:], dataset.height[:]
    )

    def source(iteration: int) -> tuple:
        chosen = (iteration * BATCH + np.arange(BATCH)) % len(dataset)
        windows = params.windows[chosen]
        return [encoded[sample] for sample in chosen], windows[:, :2].copy(), windows[:, 2:].copy()

    pipeline = Pipeline(BATCH, data.threads, device_id=None, prefetch_queue_depth=2)
    with pipeline:
        jpg, start, shape = fn.external_source(source, num_outputs=3)
        window = fn.decoders.image_slice(jpg, start=start, shape=shape, axis_names="WH", adjust_orientation=False)
        pipeline.set_outputs(window)
    pipeline.build()
    yield (pipeline.run() for _ in repeat(None))


def workers(images: object, data: Data, **options: object) -> Iterator[object]:
    """Batches of a DataLoader with worker processes, without end."""
    loader: DataLoader = DataLoader(
        images,  # type: ignore[arg-type]
        batch_size=BATCH,
        num_workers=data.threads,
        persistent_workers=True,
        multiprocessing_context="forkserver",  # a fork, with the threads of other candidates, sometimes crashes
        **options,  # type: ignore[arg-type]
    )
    return chain.from_iterable(repeat(loader))


@contextmanager
def torchvision_loader(data: Data) -> Iterator[Iterator[object]]:
    """ImageFolder and PIL."""
    yield workers(ImageFolder(str(data.files), augmentation()), data, shuffle=True, drop_last=True)


@contextmanager
def webdataset_loader(data: Data) -> Iterator[Iterator[object]]:
    """webdataset's pipeline with PIL, on the packed shards."""
    urls = [str(Path(data.dataset.folder, name)) for name in data.dataset.shard_names]
    images = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(256).decode("pil").to_tuple("jpg")
    yield workers(images.map_tuple(augmentation()), data)


@contextmanager
def grain_loader(data: Data) -> Iterator[Iterator[object]]:
    """Google's grain with PIL in worker processes."""
    import grain.python as grain

    images, augment = ImageFolder(str(data.files)), augmentation()
    source = grain.MapDataset.range(len(images)).shuffle(seed=0).repeat(None)
    mapped = source.map(lambda number: augment(images[int(number)][0]).numpy())
    batched = mapped.batch(BATCH, drop_remainder=True).to_iter_dataset()
    yield iter(batched.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.threads)))


@contextmanager
def spdl_loader(data: Data) -> Iterator[Iterator[object]]:
    """Meta's SPDL: threads that decode with PIL and augment."""
    from spdl.pipeline import PipelineBuilder

    paths, augment, random = sorted(data.files.glob("*/*")), augmentation(), np.random.default_rng(0)

    def load(number: int) -> object:
        return augment(Image.open(io.BytesIO(paths[number].read_bytes())).convert("RGB"))

    builder = PipelineBuilder().add_source(int(random.integers(len(paths))) for _ in count())
    builder = builder.pipe(load, concurrency=data.threads).aggregate(BATCH).pipe(default_collate).add_sink(4)
    pipeline = builder.build(num_threads=data.threads)
    with pipeline.auto_stop():
        yield iter(pipeline.get_iterator())


def rate(batches: Iterator[object], number: int) -> float:
    """Images/s over `number` batches, after the first 8, which start-up and prefetching distort."""
    for _ in islice(batches, 8):
        pass
    began = time.perf_counter()
    for _ in islice(batches, number):
        pass
    return number * BATCH / (time.perf_counter() - began)


def main() -> None:
    """Prints one table."""
    options = tyro.cli(Options)
    candidates: dict[str, Callable[[Data], AbstractContextManager[Iterator[object]]]] = {
        "maelstream, float32": lambda data: maelstream(data, Output("float32")),
        "maelstream, uint8": lambda data: maelstream(data, Output("uint8")),
        "torchvision ImageFolder + DataLoader": torchvision_loader,
        "webdataset + PIL": webdataset_loader,
        "stock DALI reader and resize": stock_dali,
        LIMIT: window_decode,
    }
    others = {"grain": grain_loader, "spdl": spdl_loader}
    candidates |= {name: start for name, start in others.items() if importlib.util.find_spec(name)}
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        pack(
            str(options.data), str(shards), PackOptions("b", "train", 2**24, 0), Local(options.threads), lambda _: None
        )
        data = Data(options.data, Dataset.open(shards), options.threads)
        rates: dict[str, list[float]] = {name: [] for name in candidates}
        failures: dict[str, str] = {}
        for _ in range(options.rounds):
            for name, start in candidates.items():
                if name in failures:
                    continue
                try:
                    with start(data) as batches:
                        rates[name].append(rate(batches, options.batches))
                except Exception as error:
                    if name.startswith("maelstream"):
                        raise
                    failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    medians = {name: statistics.median(values) for name, values in rates.items() if name not in failures}
    title = f"{len(data.dataset)} images, {options.threads} threads or processes"
    table = Table("loader", "images/s", "our float32 is", "our uint8 is", title=title)
    for name, median in medians.items():
        ours = (f"{medians[f'maelstream, {dtype}'] / median:.2f}x" for dtype in ("float32", "uint8"))
        table.add_row(name, f"{median:,.0f}", *ours)
    Console().print(table)
    for name in others.keys() - candidates.keys():
        print(f"{name}: not installed")
    for name, failure in failures.items():
        print(f"{name}: failed, {failure}")
    if options.json is not None:
        options.json.write_text(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
