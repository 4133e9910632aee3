"""`maelstream loader DST`: streams for a while; how fast, what is the limit, and what the model will see."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from jobs.data import open_data
from jobs.recipe import Recipe, RecipeError, StreamConfig, load_recipe
from pipeline.decode import DECODERS, DecodeConfig
from pipeline.draws import AugmentDraws
from pipeline.feed import BadSamples
from pipeline.line import Line, Slices
from pipeline.loader import PretrainLoader, feed_of
from pipeline.mix import Mix
from pipeline.order import SampleOrder
from pipeline.stream import Stream
from shards.dataset import Dataset
from shards.errors import MaelstreamError

_WARM_UP = 4  # batches


@dataclass(frozen=True)
class Loader:
    """Stream a packed dataset as pre-training would, and tell the rate and which stage holds it back."""

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """A packed dataset; a folder, or a URI such as s3://bucket/folder. With --samples, WebDataset shards that are read
    through: https://host/train-{0000..1023}.tar, pipe:..., a path."""
    samples: int | None = None
    """How many samples the shards hold, where they are read through."""
    recipe: Path | None = None
    """Take crop, shuffle, seed and image size from a pre-training recipe."""
    batch_size: int = 64
    image_size: int = 224
    """Pixels of a side, where no recipe tells."""
    threads: int = len(os.sched_getaffinity(0))
    """Threads that decode, and on a CPU as many that resize."""
    prefetch: int = 4
    """Batches read, and decoded, ahead."""
    decode: DecodeConfig = DecodeConfig()
    seconds: float = 10.0
    """How long to stream."""
    save_grid: Path | None = None
    """Write the first images as the model will see them: FILE.png."""
    json: bool = False
    """Print the figures as JSON instead of a table."""


@dataclass(frozen=True)
class Setting:
    """What is streamed, as a recipe, or its absence, says."""

    dataset: Dataset | Stream
    order: SampleOrder
    draws: AugmentDraws


def setting_of(command: Loader) -> Setting:
    """From the recipe, if there is one."""
    recipe = Recipe() if command.recipe is None else load_recipe(command.recipe)
    size = recipe.model.image_size if command.recipe is not None else (command.image_size, command.image_size)
    stream = StreamConfig(command.dst, command.samples) if command.samples is not None else StreamConfig()
    data = replace(recipe.data, dataset=command.dst, mix={}, stream=stream)
    dataset, order = open_data(data, recipe.seed)
    assert not isinstance(dataset, Mix) and isinstance(order, SampleOrder)
    return Setting(dataset, order, AugmentDraws(recipe.seed, data.crop, size))


def tiles(images: torch.Tensor, columns: int) -> np.ndarray:
    """(rows * H, columns * W, 3) of uint8 images (B, 3, H, W); places that are left over are white."""
    _, _, height, width = images.shape
    rows = -(-len(images) // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = number // columns * height, number % columns * width
        sheet[top : top + height, left : left + width] = image
    return sheet


def measure(command: Loader, setting: Setting) -> dict[str, Any]:
    """Rates of the stages, each alone on batches of the same stream, and of the whole."""
    dataset, order, draws = setting.dataset, setting.order, setting.draws
    slices = Slices(min(command.batch_size, len(dataset)), 1, 1)
    device = command.decode.device
    share = command.seconds / 4
    figures: dict[str, Any] = {}
    if isinstance(dataset, Dataset):
        line = Line(dataset, order, draws, slices, 0)
        figures["draws"] = _rate(lambda number: line.at(0, number, ()), slices.largest, share)
    feed = feed_of(dataset, order, draws, slices, 0, command.prefetch, BadSamples(1, len(dataset), lambda _: None), 0)
    figures["read"] = _rate(feed.read, slices.largest, share)
    feed.close()
    feed = feed_of(dataset, order, draws, slices, 0, command.prefetch, BadSamples(1, len(dataset), lambda _: None), 0)
    held = [feed.read(number)[1] for number in range(8)]
    feed.close()
    bytes_an_image = float(np.mean([len(data) for batch in held for data in batch.encoded]))
    decoder = DECODERS[device.type](
        lambda number: held[number % len(held)],
        slices.largest,
        draws.image_size,
        command.threads,
        device,
        config=command.decode,
    )
    figures["decode and resize"] = _rate(lambda _: decoder.run(), slices.largest, share)
    del decoder
    with loader_of(command, setting, slices) as loader:
        batches = iter(loader)
        figures["whole"] = _rate(lambda _: next(batches), slices.largest, share)
    return {
        "images_per_s": figures,
        "mb_per_s": figures["whole"] * bytes_an_image / 1e6,
        "threads": command.threads,
        "device": str(device),
        "limit": min(figures.keys() - {"whole"}, key=lambda name: figures[name]),
    }


def loader_of(command: Loader, setting: Setting, slices: Slices) -> PretrainLoader:
    """The loader that pre-training would use."""
    return PretrainLoader(
        setting.dataset,
        setting.order,
        setting.draws,
        setting.draws.image_size,
        slices,
        0,
        command.threads,
        command.prefetch,
        decode=command.decode,
        max_bad_share=1.0,
    )


def _rate(run: Callable[[int], object], size: int, seconds: float) -> float:
    """Images/s of `run`, called with 0, 1, 2, ... for about `seconds`, once past the start."""
    for number in range(_WARM_UP):
        run(number)
    began, number = time.perf_counter(), _WARM_UP
    while time.perf_counter() - began < seconds:
        run(number)
        number += 1
    return (number - _WARM_UP) * size / (time.perf_counter() - began)


def main(args: list[str]) -> int:
    """`maelstream loader`."""
    command = tyro.cli(Loader, args=args, prog="maelstream loader")
    if command.batch_size < 1 or command.threads < 1 or command.prefetch < 1 or command.seconds <= 0:
        raise RecipeError("--batch-size, --threads and --prefetch are at least 1, --seconds is more than 0")
    setting = setting_of(command)
    if command.save_grid is not None:
        with loader_of(command, setting, Slices(min(64, len(setting.dataset)), 1, 1)) as loader:
            images = next(iter(loader)).images.cpu()
        try:
            Image.fromarray(tiles(images, 8)).save(command.save_grid)
        except (OSError, ValueError) as error:
            raise MaelstreamError(f"--save-grid {command.save_grid} cannot be written ({error})") from None
    figures = measure(command, setting)
    if command.json:
        print(json.dumps(figures))
        return 0
    table = Table(
        "stage", "images/s", title=f"{setting.dataset.folder}, {command.threads} threads, {figures['device']}"
    )
    for name, value in figures["images_per_s"].items():
        table.add_row(name, f"{value:,.0f}", style="bold" if name == "whole" else "")
    console = Console()
    console.print(table)
    console.print(f"{figures['mb_per_s']:,.1f} MB/s; the limit: {figures['limit']}")
    if command.save_grid is not None:
        console.print(f"what the model will see: {command.save_grid}")
    return 0
