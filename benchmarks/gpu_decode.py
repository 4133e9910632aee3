"""The data path's parts of `make gpu-check`: both forms of decoding beside the CPU's graph, and the loader's rate."""

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
from maelstream.pipeline.loader import Batch
from maelstream.pipeline.order import SampleOrder
from maelstream.shards.dataset import Dataset

SIZE = (224, 224)
COMPARED, BATCH = 64, 256  # images of a batch
BATCHES = 4
WITHIN = 2.0  # of 255, on average: nvJPEG's chroma and DALI's bicubic; without antialias it would be 2.6
OF_BARE = 0.9
TURNS = 3


def streamed(setting: Setting, decode: DecodeConfig, batch_size: int) -> DataPath:
    """The dataset of the setting, as pre-training's loader takes it."""
    dataset = Dataset.open(setting.dataset)
    draws, batch_split = AugmentSampler(0, CropConfig(), SIZE), BatchSplit(min(batch_size, len(dataset)), 1, 1)
    config = LoaderConfig(max(1, torch.get_num_threads()), decode=decode)
    return DataPath(dataset, SampleOrder(len(dataset), 0), draws, batch_split, 0, config)


def config_of(setting: Setting, form: str) -> DecodeConfig:
    """Decoding on the setting's device."""
    return DecodeConfig(on="gpu" if setting.device == "cuda" else "cpu", form=form)  # type: ignore[arg-type]


def form(setting: Setting, form: str) -> list[Row]:
    """What a form decodes beside the CPU's graph, and whether it comes through so many images."""
    config = config_of(setting, form)
    ours, theirs = streamed(setting, config, COMPARED), streamed(setting, DecodeConfig(on="cpu"), COMPARED)
    rows = [*same_draws(ours, theirs), *same_pixels(ours, theirs)]
    return [*rows, endurance(replace(ours, batch_split=BatchSplit(min(BATCH, len(ours.dataset)), 1, 1)), setting)]


def first_batches(streamed: DataPath) -> list[Batch]:
    with streamed.loader() as loader:
        return list(islice(loader, BATCHES))


def same_draws(ours: DataPath, theirs: DataPath) -> list[Row]:
    """Windows, sizes and flips of what decoders are fed."""
    pairs = list(zip(ours.cached_batches, theirs.cached_batches, strict=True))
    equal = all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for one, other in pairs
        for name in ("windows", "resizes", "flips")
    )
    count = sum(len(one.encoded) for one, _ in pairs)
    found = f"{'equal' if equal else 'others'}, of {count:,} images"
    return [Row("windows, sizes, flips beside the CPU's", "equal", found, equal, {"images": count})]


def same_pixels(ours: DataPath, theirs: DataPath) -> list[Row]:
    """Samples, and the mean difference of their pixels."""
    samples_equal, differences = True, []
    for one, other in zip(first_batches(ours), first_batches(theirs), strict=True):
        samples_equal &= np.array_equal(one.samples, other.samples) and torch.equal(one.keys, other.keys)
        levels = (one.images.cpu().float() - other.images.cpu().float()).abs().mean(dim=(1, 2, 3))  # (B,)
        differences += levels.tolist()
    mean, worst = statistics.mean(differences), max(differences)
    found = f"{mean:.2f} of 255; the worst image {worst:.2f}" + ("" if samples_equal else "; other samples")
    figures = {"mean": mean, "worst": worst, "images": len(differences)}
    return [Row("pixels beside the CPU's", f"<= {WITHIN:.0f} of 255", found, samples_equal and mean <= WITHIN, figures)]


def endurance(streamed: DataPath, setting: Setting) -> Row:
    """Goes through the dataset again and again; a crash is the whole part's."""
    taken, began = 0, time.perf_counter()
    most_s = 5 * setting.seconds
    with streamed.loader() as loader:
        for batch in loader:
            taken += len(batch.samples)
            if taken >= setting.images or time.perf_counter() - began > most_s:
                break
    seconds = time.perf_counter() - began
    found = f"{taken:,} in {seconds:,.1f} s: {taken / seconds:,.0f} images/s, the start among them"
    figures = {"images": taken, "seconds": seconds, "images_per_s": taken / seconds}
    return Row(f"{setting.images:,} images", "no crash", found, taken >= setting.images, figures)


def loader(setting: Setting) -> list[Row]:
    """The loader alone beside bare decoding of the same windows, in turns."""
    source = streamed(setting, config_of(setting, "window"), BATCH)
    size = source.batch_split.largest
    bare, whole = [], []
    with source.loader() as running:
        batches = iter(running)
        next(batches)
    for _ in range(TURNS):
        bare.append(source.decode_rate(setting.seconds / 2))
        with source.loader() as running:
            batches = iter(running)
            whole.append(measure_rate(lambda _, batches=batches: next(batches), size, setting.seconds / 2))  # type: ignore[misc]
    decoded, delivered = statistics.median(bare), statistics.median(whole)
    share = delivered / decoded
    figures = {"decode_images_per_s": decoded, "loader_images_per_s": delivered, "share": share, "turns": TURNS}
    return [
        Row("bare decoding", "", f"{decoded:,.0f} images/s", True, {}),
        Row(
            "loader alone, of it",
            f">= {OF_BARE:.0%}",
            f"{delivered:,.0f} images/s: {share:.0%}",
            share >= OF_BARE,
            figures,
        ),
    ]
