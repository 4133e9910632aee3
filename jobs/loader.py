"""`maelstream loader DST`: streams for a while; how fast, what is the limit, and what the model will see."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from maelstream.jobs.arguments import parsed
from maelstream.jobs.profiling.data_stages import Streamed, rate
from maelstream.jobs.recipe import Recipe, RecipeError, StreamConfig, load_recipe
from maelstream.jobs.training.data import open_data
from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.decode import DecodeConfig
from maelstream.shards.errors import MaelstreamError


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


def streamed_by(command: Loader) -> Streamed:
    """What the command streams, from the recipe, if there is one."""
    recipe = Recipe() if command.recipe is None else load_recipe(command.recipe)
    size = recipe.model.image_size if command.recipe is not None else (command.image_size, command.image_size)
    stream = StreamConfig(command.dst, command.samples) if command.samples is not None else StreamConfig()
    data = replace(recipe.data, dataset=command.dst, mix={}, stream=stream)
    dataset, order = open_data(data, recipe.seed)
    draws, batch_split = (
        AugmentSampler(recipe.seed, data.crop, size),
        BatchSplit(min(command.batch_size, len(dataset)), 1, 1),
    )
    return Streamed(dataset, order, draws, batch_split, 0, command.threads, command.prefetch, command.decode)


def tiles(images: torch.Tensor, columns: int) -> np.ndarray:
    """(rows * H, columns * W, 3) of uint8 images (B, 3, H, W); places that are left over are white."""
    _, _, height, width = images.shape
    rows = -(-len(images) // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = number // columns * height, number % columns * width
        sheet[top : top + height, left : left + width] = image
    return sheet


def measure(streamed: Streamed, seconds: float) -> dict[str, Any]:
    """Rates of the stages, each alone on batches of the same stream, and of the whole; in about `seconds`."""
    share = seconds / 4
    figures: dict[str, Any] = {}
    if streamed.line is not None:
        figures["draws"] = streamed.draws_rate(streamed.line, share)
    figures["read"] = streamed.read_rate(share)
    figures["decode and resize"] = streamed.decoder_rate(share)
    with streamed.loader() as loader:
        batches = iter(loader)
        figures["whole"] = rate(lambda _: next(batches), streamed.batch_split.largest, share)
    return {
        "images_per_s": figures,
        "mb_per_s": figures["whole"] * streamed.bytes_an_image / 1e6,
        "threads": streamed.threads,
        "device": str(streamed.decode.device),
        "limit": min(figures.keys() - {"whole"}, key=lambda name: figures[name]),
    }


def main(args: list[str]) -> int:
    """`maelstream loader`."""
    command = parsed(Loader, args, "loader")
    if command.batch_size < 1 or command.threads < 1 or command.prefetch < 1 or command.seconds <= 0:
        raise RecipeError("--batch-size, --threads and --prefetch are at least 1, --seconds is more than 0")
    streamed = streamed_by(command)
    if command.save_grid is not None:
        with replace(streamed, batch_split=BatchSplit(min(64, len(streamed.dataset)), 1, 1)).loader() as loader:
            images = next(iter(loader)).images.cpu()
        try:
            Image.fromarray(tiles(images, 8)).save(command.save_grid)
        except (OSError, ValueError) as error:
            raise MaelstreamError(f"--save-grid {command.save_grid} cannot be written ({error})") from None
    figures = measure(streamed, command.seconds)
    if command.json:
        print(json.dumps(figures))
        return 0
    title = f"{streamed.dataset.folder}, {command.threads} threads, {figures['device']}"
    table = Table("stage", "images/s", title=title)
    for name, value in figures["images_per_s"].items():
        table.add_row(name, f"{value:,.0f}", style="bold" if name == "whole" else "")
    console = Console()
    console.print(table)
    console.print(f"{figures['mb_per_s']:,.1f} MB/s; the limit: {figures['limit']}")
    if command.save_grid is not None:
        console.print(f"what the model will see: {command.save_grid}")
    return 0
