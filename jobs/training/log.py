"""What a run tells while it goes: a line of `metrics.jsonl`, TensorBoard curves, and progress on the terminal."""

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from maelstream.jobs.hardware import datasheet_flops_per_s
from maelstream.jobs.recipe import AnyRecipe, Recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.training.trackers import Tracker
from maelstream.model.flops import training_flops
from maelstream.shards.errors import MaelstreamError


class Clock:
    """Seconds since the last `take`, and how many of them were spent waiting for data."""

    def __init__(self) -> None:
        self._start, self._waited_s = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens in the block takes no time."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def take(self) -> tuple[float, float]:
        """(seconds, share of them spent waiting for data), and starts anew."""
        now = time.perf_counter()
        seconds, share = now - self._start, self._waited_s / (now - self._start)
        self._start, self._waited_s = now, 0.0
        return seconds, share


class Log(Protocol):
    def __call__(self, step: int, values: dict[str, Any]) -> None: ...


@contextmanager
def run_log(name: str, folder: RunFolder, start: int, total: int, trackers: list[Tracker]) -> Iterator[Log]:
    """A function that records the values of a step; for rank 0. `total` steps make the whole run of command `name`."""
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    task = bar.add_task(name, total=total, completed=start)
    began = time.monotonic()
    with (
        folder.metrics.open("a") as metrics,
        SummaryWriter(str(folder.tensorboard), purge_step=start + 1) as curves,
        bar,
    ):

        def log(step: int, values: dict[str, Any]) -> None:
            try:
                metrics.write(json.dumps({"step": step, **values}) + "\n")
                metrics.flush()
            except OSError as error:
                raise MaelstreamError(
                    f"{folder.metrics} cannot be written ({error.strerror}); make room, then start the run again"
                ) from None
            for name, value in values.items():
                if value is not None and name != "epoch":
                    curves.add_scalar(name, float(value), step)
            for tracker in trackers:
                tracker(step, values)
            text = described(values)
            bar.update(task, completed=step, description=text)
            if not console.is_terminal:  # a log file gets a line a log step instead of a bar
                left_s = (time.monotonic() - began) / (step - start) * (total - step)
                print(f"step {step}/{total}  {text}  ETA {left_s / 60:.1f} min", flush=True)

        yield log


def described(values: dict[str, Any]) -> str:
    """A log step in a few words."""
    loss = "not finite, skipped" if values["loss"] is None else f"{values['loss']:.4f}"
    mfu = f"  MFU {values['mfu']:.1%}" if values.get("mfu") is not None else ""
    top1 = f"  top-1 {values['top1']:.2f} %" if "top1" in values else ""
    return (
        f"loss {loss}  lr {values['lr']:.2e}  {values['images_per_s']:,.0f} images/s{mfu}  "
        f"data wait {values['data_wait']:.1%}{top1}"
    )


def peak_flops(recipe: AnyRecipe) -> float:
    """Of one rank's accelerator, a second; 0 where it is not known, rather than guessed."""
    if recipe.log.peak_tflops:
        return recipe.log.peak_tflops * 1e12
    if not torch.cuda.is_available():
        return 0.0
    dtype = torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32
    return datasheet_flops_per_s(torch.cuda.get_device_name(), dtype) or 0.0


def mfu(recipe: AnyRecipe, images_per_s: float, ranks: int) -> float | None:
    """Model FLOPs utilisation: what the model needs (model.flops, of pre-training) over what the accelerators could."""
    if not isinstance(recipe, Recipe) or not (peak := peak_flops(recipe)):
        return None
    return images_per_s * training_flops(recipe.model) / (peak * ranks)


def memory_gib() -> float:
    """Most memory that this rank has held: the GPU's, or the process's where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
