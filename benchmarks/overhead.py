"""Measures the overhead of profiling: CPU time per step inside `maelstream profile` and in pre-training's own loop.

    python -m benchmarks.overhead [--json FILE]      # under a minute

Both take steps of the recipe with the same engine, on one thread and on images in memory, in turns. CPU seconds are
compared, because other work on the machine does not change them. The third row is a step that `--trace` records.
"""

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from maelstream.jobs.distributed.ranks import ControlGroup, process_group, ranks_from_environment
from maelstream.jobs.hardware import process_device
from maelstream.jobs.profiling.end_to_end import measure_end_to_end, write_trace
from maelstream.jobs.profiling.step_stages import DeviceBatch
from maelstream.jobs.recipe import load_recipe
from maelstream.jobs.training.data import batch_split_of
from maelstream.jobs.training.engine import build_engine, build_model
from maelstream.jobs.training.log import Clock
from maelstream.jobs.training.pretraining import reconstruction_loss
from maelstream.jobs.training.step import train_step
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.producer import Batch

PLAIN, PROFILED, TRACED = "pre-training's loop", "inside the profile", "under torch.profiler"


@dataclass(frozen=True)
class Options:
    recipe: Path = Path(__file__).parents[1] / "recipes" / "pretrain" / "demo.yaml"
    rounds: int = 7
    seconds: float = 1.5
    """Seconds per candidate and round."""
    json: Path | None = None
    """Write the medians to this JSON file: CPU seconds per step, by name."""


class OneBatch(NamedTuple):
    """A data path that yields the same batch without end."""

    batch_split: BatchSplit
    batch: Batch

    @contextlib.contextmanager
    def loader(self) -> Iterator[Iterator[Batch]]:
        yield repeat(self.batch)


def one_batch(recipe: Any, device: torch.device) -> OneBatch:
    """A batch of random pixels with the recipe's shape."""
    batch_split = batch_split_of(recipe, 1)
    images, keys = DeviceBatch.random(batch_split.largest, recipe, device)
    numbers = np.arange(batch_split.largest)
    return OneBatch(batch_split, Batch(images, keys, numbers, numbers, numbers.astype(np.int32), 1.0))


def plain_s(engine: Any, source: OneBatch, control_group: ControlGroup, steps: int) -> float:
    """CPU seconds per step in a loop like that of jobs/training/trainer.py."""
    clock, batches, micro_batches = Clock(), repeat(source.batch), source.batch_split.micro_batches

    def loss(images: Tensor, batch: Batch, micro_batch: int) -> Tensor:
        return reconstruction_loss(engine, images, batch)

    began = time.process_time()
    for _ in range(steps):
        train_step(engine, loss, batches, micro_batches, clock, lambda: None, control_group)
    return (time.process_time() - began) / steps


def profiled_s(engine: Any, source: Any, control_group: ControlGroup, seconds: float) -> tuple[float, int]:
    """CPU seconds per step, from the profile's own figures; and the number of steps."""
    stats = measure_end_to_end(engine, source, control_group, source.batch_split.micro_batches, seconds, None)
    cores = len(os.sched_getaffinity(0))
    return stats.cpu_utilisation * cores * source.batch_split.batch_size / stats.images_per_s, stats.steps


def traced_s(engine: Any, source: OneBatch, control_group: ControlGroup, steps: int) -> float:
    """CPU seconds per step under torch.profiler, without the time to write the file."""
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        write_trace(
            lambda: seconds.append(plain_s(engine, source, control_group, steps)),
            Path(folder) / "trace.json",
            control_group.ranks.rank,
        )
    return seconds[0]


def measure(options: Options) -> dict[str, float]:
    """Median CPU seconds per step, by name."""
    recipe = load_recipe(options.recipe)
    ranks, found = ranks_from_environment(), {name: list[float]() for name in (PLAIN, PROFILED, TRACED)}
    with process_group(ranks, 600) as control_group:
        torch.set_num_threads(1)
        source = one_batch(recipe, process_device())
        engine = build_engine(recipe, source.batch_split, build_model(recipe, None))
        plain_s(engine, source, control_group, 2)
        for _ in range(options.rounds):
            seconds, steps = profiled_s(engine, source, control_group, options.seconds)
            found[PROFILED].append(seconds)
            found[PLAIN].append(plain_s(engine, source, control_group, steps))
            found[TRACED].append(traced_s(engine, source, control_group, 3))
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Prints one table."""
    options = tyro.cli(Options, prog="python -m benchmarks.overhead", description=__doc__)
    medians = measure(options)
    table = Table("steps", "CPU ms", "over pre-training's", title=f"{options.recipe.stem}, one thread")
    for name, seconds in medians.items():
        table.add_row(name, f"{1e3 * seconds:.2f}", f"{seconds / medians[PLAIN] - 1:+.2%}")
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(medians, indent=1) + "\n")


if __name__ == "__main__":
    main()
