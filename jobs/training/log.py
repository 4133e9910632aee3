"""What a run reports while it trains: `metrics.jsonl`, TensorBoard, `status.json` and progress on the terminal."""

import json
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import Signals
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from maelstream.jobs.distributed.ranks import Ranks
from maelstream.jobs.hardware import datasheet_flops_per_s
from maelstream.jobs.recipe import AnyRecipe, Recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.status import Status, read_status
from maelstream.jobs.training.schedule import Schedule
from maelstream.jobs.training.trackers import Tracker
from maelstream.model.flops import training_flops
from maelstream.shards.errors import DatasetError


class Clock:
    """Measures the time between log steps and the part of it spent waiting for data."""

    def __init__(self) -> None:
        self._start, self._waited_s = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Excludes the time of the block."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def take(self) -> tuple[float, float]:
        """Seconds since the last call, and the share of them spent waiting for data."""
        now = time.perf_counter()
        seconds, share = now - self._start, self._waited_s / (now - self._start)
        self._start, self._waited_s = now, 0.0
        return seconds, share


class Log(Protocol):
    def __call__(self, step: int, values: dict[str, Any]) -> None: ...


@contextmanager
def run_log(name: str, folder: RunFolder, start: int, total: int, trackers: list[Tracker]) -> Iterator[Log]:
    """Yields the function that records the values of a step, for rank 0 of command `name`.

    `start` is the step that the run resumes from, `total` its number of steps.
    """
    console = Console(markup=False, emoji=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    task = bar.add_task(name, total=total, completed=start)
    began = time.monotonic()
    metrics = Metrics(folder.metrics)
    with _curves(folder.tensorboard, start) as add_to_curves, bar:

        def log(step: int, values: dict[str, Any]) -> None:
            metrics.add(json.dumps({"step": step, **values}) + "\n")
            add_to_curves(step, values)
            for tracker in trackers:
                tracker(step, values)
            text = described(values)
            bar.update(task, completed=step, description=text)
            if not console.is_terminal:  # a log file gets one line per log step instead of a bar
                left_s = (time.monotonic() - began) / (step - start) * (total - step)
                print(f"step {step}/{total}  {text}  ETA {left_s / 60:.1f} min", flush=True)

        yield log


class Metrics:
    """Appends lines to `metrics.jsonl`; lines that a full disk does not take are kept and written later."""

    def __init__(self, path: Path):
        self._path, self._unwritten = path, b""

    def add(self, line: str) -> None:
        """Adds a line, which ends with a line feed. A failure is reported and does not end the run."""
        lines = self._unwritten + line.encode()
        try:
            with self._path.open("ab", buffering=0) as file:
                while lines:
                    lines = lines[file.write(lines) :]
        except OSError as error:
            if not self._unwritten:
                _report(self._path, error)
        self._unwritten = lines


@contextmanager
def _curves(folder: Path, start: int) -> Iterator[Log]:
    """Yields a function that adds a step's values to TensorBoard. A failure is reported once; training continues."""
    writer: SummaryWriter | None = None
    reported = False

    def fail(error: OSError) -> None:
        nonlocal writer, reported
        if not reported:
            _report(folder, error)
        writer, reported = None, True

    def in_thread(failure: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread, whose traceback would follow."""
        if isinstance(failure.exc_value, OSError):
            fail(failure.exc_value)
        else:
            threading.__excepthook__(failure)

    def add(step: int, values: dict[str, Any]) -> None:
        try:
            for name, value in values.items():
                if writer is not None and value is not None and name != "epoch":
                    writer.add_scalar(name, float(value), step)
        except OSError as error:
            fail(error)

    before, threading.excepthook = threading.excepthook, in_thread
    try:
        try:
            writer = SummaryWriter(str(folder), purge_step=start + 1)
        except OSError as error:
            fail(error)
        yield add
    finally:
        try:
            if writer is not None:
                writer.close()
        except OSError as error:
            fail(error)
        threading.excepthook = before


def _report(path: Path, error: OSError) -> None:
    """Says that a by-product of the run is not written."""
    why = error.strerror or error
    print(f"maelstream: {path} cannot be written ({why}); training continues without it", file=sys.stderr, flush=True)


def described(values: dict[str, Any]) -> str:
    """One line of text for the terminal."""
    loss = "not finite, skipped" if values["loss"] is None else f"{values['loss']:.4f}"
    mfu = f"  MFU {values['mfu']:.1%}" if values.get("mfu") is not None else ""
    top1 = f"  top-1 {values['top1']:.2f} %" if "top1" in values else ""
    return (
        f"loss {loss}  lr {values['lr']:.2e}  {values['images_per_s']:,.0f} images/s{mfu}  "
        f"data wait {values['data_wait']:.1%}{top1}"
    )


def peak_flops(recipe: AnyRecipe) -> float:
    """Peak FLOPs per second of one rank's accelerator; 0 where it is unknown."""
    if recipe.log.peak_tflops:
        return recipe.log.peak_tflops * 1e12
    if not torch.cuda.is_available():
        return 0.0
    return datasheet_flops_per_s(torch.cuda.get_device_name(), recipe.engine.precision) or 0.0


def mfu(recipe: AnyRecipe, images_per_s: float, ranks: int) -> float | None:
    """Model FLOPs utilisation of pre-training: its FLOPs (model/flops.py) over the accelerators' peak."""
    if not isinstance(recipe, Recipe) or not (peak := peak_flops(recipe)):
        return None
    return images_per_s * training_flops(recipe.model) / (peak * ranks)


def memory_gib() -> float:
    """Peak memory of this rank in GiB: of its GPU, or of the process without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def no_log(step: int, values: dict[str, Any]) -> None:
    """The log of ranks other than 0."""


class Reporter:
    """Logs steps and keeps `status.json` up to date, on rank 0; use it as a context manager."""

    def __init__(self, recipe: AnyRecipe, folder: RunFolder, schedule: Schedule, ranks: Ranks, step: int, log: Log):
        self._recipe, self._folder, self._schedule, self._ranks, self._log = recipe, folder, schedule, ranks, log
        self._step = self._logged = step
        self._status_failed = False
        self.clock = Clock()

    def __enter__(self) -> "Reporter":
        self._write_status("running")
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """The first rank that meets an error records it; the ranks that lose it do not overwrite that."""
        status = read_status(self._folder.status)
        if error is not None and (status is None or status.state != "failed"):
            failed = Status("failed", self._step, self._schedule.total_steps, self._ranks.world_size, str(error))
            with suppress(DatasetError):  # a full disk; the error itself is reported
                failed.write(self._folder.status)

    def step(
        self,
        step: int,
        *,
        epoch: float,
        loss: float | None,
        grad_norm: float | None,
        skipped: int,
        spike: bool,
        scores: dict[str, float],
    ) -> None:
        """Logs a step. `loss` and `grad_norm` are None for a skipped step; `skipped` counts those so far."""
        seconds, data_wait = self.clock.take()
        images_per_s = (step - self._logged) * self._recipe.optim.batch_size / seconds
        self._step = self._logged = step
        values = {
            "epoch": epoch,
            "loss": loss,
            "lr": self._schedule.lr(step - 1),
            "grad_norm": grad_norm,
            "images_per_s": images_per_s,
            "data_wait": data_wait,
            "memory_gib": memory_gib(),
            "skipped": skipped,
            "spike": spike,
        }
        if (utilisation := mfu(self._recipe, images_per_s, self._ranks.world_size)) is not None:
            values["mfu"] = utilisation
        self._log(step, values | scores)
        self._write_status("running")

    def ended(self, step: int, signal: Signals | None) -> None:
        """Records how the run ended: by a signal, at --stop-at-step, or at the end of its schedule."""
        self._step = step
        if signal is not None:
            self._write_status("stopped", signal.name)
        elif step < self._schedule.total_steps:
            self._write_status("stopped", "--stop-at-step")
        else:
            self._write_status("finished")

    def _write_status(self, state: Any, why: str = "") -> None:
        if self._ranks.rank == 0:
            status = Status(state, self._step, self._schedule.total_steps, self._ranks.world_size, why)
            try:
                status.write(self._folder.status)
            except DatasetError as error:  # a full disk
                if not self._status_failed:
                    print(f"maelstream: {error}; training continues", file=sys.stderr, flush=True)
                self._status_failed = True
