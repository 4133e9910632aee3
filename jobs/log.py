"""What a run tells while it goes: a line of `metrics.jsonl`, TensorBoard curves, and progress on the terminal."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from jobs.runfolder import RunFolder


class Clock:
    """Seconds since the last `take`, and how many of them were spent waiting for data."""

    def __init__(self) -> None:
        self._start, self._waited_s = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start

    def take(self) -> tuple[float, float]:
        """(seconds, share of them spent waiting for data), and starts anew."""
        now = time.perf_counter()
        seconds, share = now - self._start, self._waited_s / (now - self._start)
        self._start, self._waited_s = now, 0.0
        return seconds, share


class Log(Protocol):
    def __call__(self, step: int, values: dict[str, Any]) -> None: ...


@contextmanager
def run_log(folder: RunFolder, start: int, total: int) -> Iterator[Log]:
    """A function that records the values of a step; for rank 0. `total` steps make the whole run."""
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    task = bar.add_task("pretrain", total=total, completed=start)
    began = time.monotonic()
    with (
        folder.metrics.open("a") as metrics,
        SummaryWriter(str(folder.tensorboard), purge_step=start + 1) as curves,
        bar,
    ):

        def log(step: int, values: dict[str, Any]) -> None:
            metrics.write(json.dumps({"step": step, **values}) + "\n")
            metrics.flush()
            for name in ("loss", "lr", "images_per_s", "data_wait"):
                curves.add_scalar(name, values[name], step)
            text = (
                f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  {values['images_per_s']:,.0f} images/s  "
                f"data wait {values['data_wait']:.1%}"
            )
            bar.update(task, completed=step, description=text)
            if not console.is_terminal:  # a log file gets a line a log step instead of a bar
                left_s = (time.monotonic() - began) / (step - start) * (total - step)
                print(f"step {step}/{total}  {text}  ETA {left_s / 60:.1f} min", flush=True)

        yield log
