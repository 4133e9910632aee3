"""The data path's parts of `make gpu-check`: both forms of decoding against the CPU, and the loader's rate."""

import statistics
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import torch

from benchmarks.gpu_part import Row, Setting
from maelstream.jobs.profiling.data_stages import DataPath, measure_rate
from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.config import CropConfig, DecodeConfig, LoaderConfig
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.producer import Batch
from maelstream.shards.dataset import Dataset

SIZE = (224, 224)
COMPARED, BATCH = 64, 256  # images per batch
BATCHES = 4
MAX_DIFFERENCE = 2.0  # of 255: nvJPEG's chroma and DALI's bicubic; without antialias it would be 2.6
MIN_LOADER_SHARE = 0.9  # of the rate of decoding alone
TURNS = 3


def data_path_of(setting: Setting, decode: DecodeConfig, batch_size: int) -> DataPath:
    """The data path of pre-training on the setting's dataset."""
    dataset = Dataset.open(setting.dataset)
    draws, batch_split = AugmentSampler(0, CropConfig(), SIZE), BatchSplit(min(batch_size, len(dataset)), 1, 1)
    config = LoaderConfig(max(1, torch.get_num_threads()), decode=decode)
    return DataPath(dataset, SampleOrder(len(dataset), 0), draws, batch_split, 0, config)


def decode_config_of(setting: Setting, form: str) -> DecodeConfig:
    """The configuration of decoding on the setting's device."""
    return DecodeConfig(on="gpu" if setting.device == "cuda" else "cpu", form=form)  # type: ignore[arg-type]


def form(setting: Setting, form: str) -> list[Row]:
    """Compares what a form of decoding yields with the CPU, and decodes many images to see whether it crashes."""
    config = decode_config_of(setting, form)
    ours, theirs = data_path_of(setting, config, COMPARED), data_path_of(setting, DecodeConfig(on="cpu"), COMPARED)
    rows = [*same_draws(ours, theirs), *same_pixels(ours, theirs)]
    return [*rows, endurance(replace(ours, batch_split=BatchSplit(min(BATCH, len(ours.dataset)), 1, 1)), setting)]


def first_batches(data_path: DataPath) -> list[Batch]:
    with data_path.loader() as loader:
        return list(islice(loader, BATCHES))


def same_draws(ours: DataPath, theirs: DataPath) -> list[Row]:
    """Whether both decoders get the same crop windows, sizes and flips."""
    pairs = list(zip(ours.cached_batches, theirs.cached_batches, strict=True))
    equal = all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for one, other in pairs
        for name in ("windows", "resizes", "flips")
    )
    count = sum(len(one.encoded) for one, _ in pairs)
    found = f"{'equal' if equal else 'different'}, for {count:,} images"
    return [Row("windows, sizes, flips against the CPU's", "equal", found, equal, {"images": count})]


def same_pixels(ours: DataPath, theirs: DataPath) -> list[Row]:
    """Whether both loaders yield the same samples, and the mean difference of their pixels."""
    samples_equal, differences = True, []
    for one, other in zip(first_batches(ours), first_batches(theirs), strict=True):
        samples_equal &= np.array_equal(one.samples, other.samples) and torch.equal(one.keys, other.keys)
        levels = (one.images.cpu().float() - other.images.cpu().float()).abs().mean(dim=(1, 2, 3))  # (B,)
        differences += levels.tolist()
    mean, worst = statistics.mean(differences), max(differences)
    found = f"{mean:.2f} of 255; the worst image {worst:.2f}" + ("" if samples_equal else "; different samples")
    figures = {"mean": mean, "worst": worst, "images": len(differences)}
    return [
        Row(
            "pixels against the CPU's",
            f"<= {MAX_DIFFERENCE:.0f} of 255",
            found,
            samples_equal and mean <= MAX_DIFFERENCE,
            figures,
        )
    ]


def endurance(data_path: DataPath, setting: Setting) -> Row:
    """Streams the dataset repeatedly; a crash ends the whole part."""
    taken, began = 0, time.perf_counter()
    most_s = 5 * setting.seconds
    with data_path.loader() as loader:
        for batch in loader:
            taken += len(batch.samples)
            if taken >= setting.images or time.perf_counter() - began > most_s:
                break
    seconds = time.perf_counter() - began
    found = f"{taken:,} in {seconds:,.1f} s: {taken / seconds:,.0f} images/s, including the start"
    figures = {"images": taken, "seconds": seconds, "images_per_s": taken / seconds}
    return Row(f"{setting.images:,} images", "no crash", found, taken >= setting.images, figures)


def loader(setting: Setting) -> list[Row]:
    """Compares the loader with decoding alone of the same windows, in turns."""
    source = data_path_of(setting, decode_config_of(setting, "window"), BATCH)
    size = source.batch_split.largest
    decode_rates, loader_rates = [], []
    with source.loader() as running:
        batches = iter(running)
        next(batches)
    for _ in range(TURNS):
        decode_rates.append(source.decode_rate(setting.seconds / 2))
        with source.loader() as running:
            batches = iter(running)
            loader_rates.append(measure_rate(lambda _, batches=batches: next(batches), size, setting.seconds / 2))  # type: ignore[misc]
    decoded, delivered = statistics.median(decode_rates), statistics.median(loader_rates)
    share = delivered / decoded
    figures = {"decode_images_per_s": decoded, "loader_images_per_s": delivered, "share": share, "turns": TURNS}
    return [
        Row("decoding alone", "", f"{decoded:,.0f} images/s", True, {}),
        Row(
            "loader, share of decoding alone",
            f">= {MIN_LOADER_SHARE:.0%}",
            f"{delivered:,.0f} images/s: {share:.0%}",
            share >= MIN_LOADER_SHARE,
            figures,
        ),
    ]
