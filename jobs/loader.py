"""`maelstream loader DST`: measures how fast the loader streams a dataset and which stage limits it."""

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from maelstream.jobs.arguments import check_picture_file, make_folder, parse_arguments
from maelstream.jobs.recipe import Recipe, RecipeError, StreamConfig, load_recipe
from maelstream.pipeline.config import DecodeConfig, LoaderConfig
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError

if TYPE_CHECKING:  # torch and DALI take seconds to import, and the options are checked without them
    import torch

    from maelstream.jobs.profiling.data_stages import DataPath

_TURNS = 3  # of each stage


@dataclass(frozen=True)
class Loader:
    """Stream a dataset as pre-training would, and report the rates of all stages and which stage limits them."""

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """A packed dataset: a folder, or a URI such as s3://bucket/folder. With --samples, WebDataset shards that are
    streamed: https://host/train-{0000..1023}.tar, pipe:..., a path."""
    samples: int | None = None
    """Number of samples in the shards, if they are streamed."""
    recipe: Path | None = None
    """A pre-training recipe from which crop, shuffle, seed and image size are read."""
    batch_size: int = 64
    """Images per batch."""
    image_size: int = 224
    """Side of the square images in pixels, if there is no recipe."""
    threads: int = len(os.sched_getaffinity(0))
    """Threads that decode; on a CPU as many again resize."""
    prefetch: int = 4
    """Batches that are read ahead, and decoded ahead."""
    decode: DecodeConfig = DecodeConfig()
    seconds: float = 10.0
    """Seconds to measure."""
    save_grid: Path | None = None
    """Write the first images, as the model will see them, to this file: .png, .jpg or .webp."""
    json: bool = False
    """Print the figures as JSON instead of a table."""


def data_path_of(command: Loader) -> "DataPath":
    """The data path of the command's options and of its recipe, if there is one."""
    # Opened before the slow imports, because it may not be there.
    packed = Dataset.open(command.dst) if command.samples is None else None
    recipe = Recipe() if command.recipe is None else load_recipe(command.recipe)
    size = recipe.model.image_size if command.recipe is not None else (command.image_size, command.image_size)
    stream = StreamConfig(command.dst, command.samples) if command.samples is not None else StreamConfig()
    data = replace(recipe.data, dataset=command.dst, mix={}, stream=stream)
    from maelstream.jobs.profiling.data_stages import DataPath
    from maelstream.jobs.training.data import open_data
    from maelstream.pipeline.augment_params import AugmentSampler
    from maelstream.pipeline.batch_plan import BatchSplit
    from maelstream.pipeline.order import SampleOrder

    if packed is None:
        dataset, order = open_data(data, recipe.seed)
    else:
        dataset, order = packed, SampleOrder(len(packed), recipe.seed, data.shuffle)
    sampler = AugmentSampler(recipe.seed, data.crop, size)
    batch_split = BatchSplit(min(command.batch_size, len(dataset)), 1, 1)
    return DataPath(
        dataset, order, sampler, batch_split, 0, LoaderConfig(command.threads, command.prefetch, command.decode)
    )


def image_grid(images: "torch.Tensor", columns: int) -> np.ndarray:
    """Lays out uint8 images (B, 3, H, W) as one image (rows * H, columns * W, 3); unused cells are white."""
    _, _, height, width = images.shape
    rows = -(-len(images) // columns)
    grid = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = number // columns * height, number % columns * width
        grid[top : top + height, left : left + width] = image
    return grid


def measure_stages(data_path: "DataPath", seconds: float) -> dict[str, Any]:
    """Images/s of each stage alone, on the same batches, and of the whole loader.

    The stages are measured in turns, so that other processes on the machine slow all of them down alike; a figure is
    the median of its turns. Takes about `seconds`, and the warm-up of each turn.
    """
    from maelstream.jobs.profiling.data_stages import measure_rate
    from maelstream.pipeline.decode import decode_device

    def whole_rate(seconds: float) -> float:
        with data_path.loader() as loader:
            batches = iter(loader)
            return measure_rate(lambda _: next(batches), data_path.batch_split.largest, seconds)

    stages: dict[str, Callable[[float], float]] = {}
    if (plan := data_path.batch_plan) is not None:
        stages["draws"] = partial(data_path.plan_rate, plan)
    stages |= {"read": data_path.read_rate, "decode and resize": data_path.decoder_rate, "whole": whole_rate}
    turns: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(_TURNS):
        for name, rate in stages.items():
            turns[name].append(rate(seconds / _TURNS / len(stages)))
    figures = {name: statistics.median(rates) for name, rates in turns.items()}
    return {
        "images_per_s": figures,
        "mb_per_s": figures["whole"] * data_path.bytes_per_image / 1e6,
        "threads": data_path.loader_config.threads,
        "device": str(decode_device(data_path.loader_config.decode)),
        "spread": max((max(rates) - min(rates)) / statistics.median(rates) for rates in turns.values()),
        "limit": min(figures.keys() - {"whole"}, key=lambda name: figures[name]),
    }


def limit_text(figures: dict[str, Any]) -> str:
    """What limits the loader, by the figures of `measure_stages`.

    The stages overlap, so the whole is at most as fast as the slowest of them; if it was faster, that is noise.
    """
    rates, limit = figures["images_per_s"], figures["limit"]
    if rates["whole"] <= rates[limit]:
        return f"the limit: {limit}"
    return (
        f"the limit: {limit}, although the whole was measured {rates['whole'] / rates[limit] - 1:.0%} faster: rates "
        f"differed by up to {figures['spread']:.0%} between turns, because other processes run; give more --seconds"
    )


def main(args: list[str]) -> int:
    """`maelstream loader`."""
    command = parse_arguments(Loader, args, "loader")
    if command.batch_size < 1 or command.threads < 1 or command.prefetch < 1 or command.seconds <= 0:
        raise RecipeError("--batch-size, --threads and --prefetch are at least 1, --seconds is more than 0")
    if command.save_grid is not None:
        make_folder("--save-grid", command.save_grid)
        check_picture_file("--save-grid", command.save_grid)
    data_path = data_path_of(command)
    if command.save_grid is not None:
        from maelstream.pipeline.batch_plan import BatchSplit

        with replace(data_path, batch_split=BatchSplit(min(64, len(data_path.dataset)), 1, 1)).loader() as loader:
            images = next(iter(loader)).images.cpu()
        try:
            Image.fromarray(image_grid(images, 8)).save(command.save_grid)
        except (OSError, ValueError) as error:
            raise MaelstreamError(f"--save-grid {command.save_grid} cannot be written ({error})") from None
    figures = measure_stages(data_path, command.seconds)
    if command.json:
        print(json.dumps(figures))
        return 0
    title = f"{data_path.dataset.folder}, {command.threads} threads, {figures['device']}"
    table = Table("stage", "images/s", title=title)
    for name, value in figures["images_per_s"].items():
        table.add_row(name, f"{value:,.0f}", style="bold" if name == "whole" else "")
    console = Console(markup=False, emoji=False)
    console.print(table)
    console.print(f"{figures['mb_per_s']:,.1f} MB/s; {limit_text(figures)}")
    if command.save_grid is not None:
        console.print(f"first images: {command.save_grid}")
    return 0
