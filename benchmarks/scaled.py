"""Decoding at a DCT scale: the loader's rate with and without it, and how much its pixels differ.

Crops of several sizes, because a DCT scale applies only if the window is at least twice as large as the crop. Both
candidates run in turn; the median round counts. Pixels are compared with PIL's full decode, crop and bicubic resize.

    python -m benchmarks.scaled --data ../shared/imagenet-sample
"""

import io
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.loaders import BATCH, rate
from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.config import CropConfig, DecodeConfig, LoaderConfig
from maelstream.pipeline.dct_scaling import reduction
from maelstream.pipeline.decode import CpuDecoder, EncodedBatch
from maelstream.pipeline.loader import ImageLoader
from maelstream.pipeline.order import SampleOrder
from maelstream.shards.dataset import Dataset
from maelstream.shards.executors import Local
from maelstream.shards.pack import pack
from maelstream.shards.plan import PackOptions
from maelstream.shards.reader import ShardReader


@dataclass(frozen=True)
class Options:
    data: Path = Path("../shared/imagenet-sample")
    """A folder of images with one folder per class."""
    sizes: tuple[int, ...] = (224, 112, 64, 32)
    """Side lengths of the crop in pixels."""
    enlarge: int = 1
    """Use every eighth image, enlarged by this factor in width and height, in place of photographs of a camera."""
    threads: int = 2
    rounds: int = 3
    batches: int = 12
    """Batches per round and candidate."""
    json: Path | None = None
    """Also write the figures to this file, by side length of the crop."""


def difference(batch: EncodedBatch, images: torch.Tensor) -> float:
    """Mean absolute difference from PIL's image, in levels of 255."""
    total = 0.0
    for data, window, flip, image in zip(batch.encoded, batch.windows, batch.flips, images.numpy(), strict=True):
        left, top, width, height = window.tolist()
        with Image.open(io.BytesIO(data.tobytes())) as file:
            crop = file.convert("RGB").crop((left, top, left + width, top + height))
        pixels = np.asarray(crop.resize(image.shape[:0:-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        total += np.abs((pixels[:, :, ::-1] if flip else pixels).astype(int) - image).mean()
    return total / len(images)


def main() -> None:
    """Prints one table."""
    options = tyro.cli(Options)
    table = Table("crop", "images/s, full", "images/s, scaled", "ratio", "images scaled", "levels off, full", "scaled")
    figures: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = options.data
        if options.enlarge > 1:
            data = Path(folder) / "src" / "a"
            data.mkdir(parents=True)
            for number, path in enumerate(sorted(options.data.glob("*/*"))[::8]):
                with Image.open(path) as image:
                    size = image.width * options.enlarge, image.height * options.enlarge
                    image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(data / f"{number}.jpg", quality=90)
            data = data.parent
        pack(str(data), f"{folder}/shards", PackOptions("b", "train", 2**24, 0), Local(options.threads), lambda _: None)
        dataset = Dataset.open(f"{folder}/shards")
        for side in options.sizes:
            sampler = AugmentSampler(0, CropConfig(), (side, side))
            samples = np.arange(min(256, len(dataset)))
            sizes = dataset.width[samples], dataset.height[samples]
            batch = EncodedBatch.of(
                ShardReader(dataset, check_crc=True).read(samples), sampler.at(np.zeros_like(samples), samples, *sizes)
            )
            rates: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(options.rounds):
                for scaling, found in rates.items():
                    order, batch_split = SampleOrder(len(dataset), 0), BatchSplit(BATCH, 1, 1)
                    decode = DecodeConfig(on="cpu", dct_scaling=scaling)
                    config = LoaderConfig(options.threads, decode=decode)
                    with ImageLoader(dataset, order, sampler, batch_split, config=config) as loader:
                        found.append(rate(iter(loader), options.batches))
            off = {
                scaling: difference(
                    batch,
                    CpuDecoder(
                        lambda _, batch=batch: batch,  # type: ignore[misc]
                        len(samples),
                        (side, side),
                        options.threads,
                        torch.device("cpu"),
                        config=DecodeConfig(dct_scaling=scaling),
                    ).run(),
                )
                for scaling in rates
            }
            full, scaled = (statistics.median(rates[scaling]) for scaling in (False, True))
            share = np.mean(
                [reduction(*row) > 1 for row in zip(batch.encoded, batch.windows, batch.resizes, strict=True)]
            )
            table.add_row(
                f"{side} px", f"{full:,.0f}", f"{scaled:,.0f}", f"{scaled / full:.2f}x", f"{share:.0%}",
                f"{off[False]:.2f}", f"{off[True]:.2f}",
            )  # fmt: skip
            figures[side] = {
                "images/s, full": full,
                "images/s, scaled": scaled,
                "share scaled": float(share),
                "levels off, full": off[False],
                "levels off, scaled": off[True],
            }
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
