"""Progress of packing shards: a bar with rate, time left and quarantine count, or plain lines without a terminal."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from maelstream.jobs.format import format_clock
from maelstream.shards import pack

_STEPS = {"scan": "sources scanned", "shard": "shards"}


class PackProgress:
    """Shows the progress of `maelstream pack`; use it as a context manager and call it with each report."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, disable=not sys.stdout.isatty())
        self._tasks: dict[str, TaskID] = {}
        self._samples = self._quarantined = self._bytes = 0
        self._step = ""
        self._began = self._reported = time.monotonic()

    def __enter__(self) -> "PackProgress":
        self._bar.start()
        self._began = self._reported = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def __call__(self, progress: pack.Progress | pack.Notice) -> None:
        if isinstance(progress, pack.Notice):
            print(f"note: {progress}", file=sys.stderr, flush=True)
            return
        if progress.step != self._step:
            self._began = self._reported  # a step begins when the one before it ends, not when it first reports
            self._step, self._samples, self._quarantined, self._bytes = progress.step, 0, 0, 0
        self._samples += progress.samples
        self._quarantined += progress.quarantined
        self._bytes += progress.bytes
        self._reported = time.monotonic()
        elapsed_s = max(self._reported - self._began, 1e-9)
        text = f"{progress.done:,}/{progress.total:,} {_STEPS[progress.step]}"
        numbers = (
            f"{self._samples:,} images, {self._samples / elapsed_s:,.0f} images/s, "
            f"{self._bytes / 2**20 / elapsed_s:,.1f} MiB/s"
        )
        if progress.step == "shard":
            numbers += f", {self._quarantined:,} quarantined"
        if self._bar.disable:
            left_s = (progress.total_bytes - self._bytes) * elapsed_s / max(self._bytes, 1)
            print(f"{text}: {progress.name}: {numbers}, {format_clock(left_s)} left", flush=True)
            return
        if progress.step not in self._tasks:
            self._tasks[progress.step] = self._bar.add_task(text, total=progress.total_bytes, numbers="")
        self._bar.update(
            self._tasks[progress.step], description=text, completed=self._bytes, numbers=numbers, refresh=True
        )


@contextmanager
def interruptible() -> Iterator[None]:
    """The first Ctrl-C raises KeyboardInterrupt, so that files in progress are completed; a second exits at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # its workers end with this process
        print("\nstopping after the files in progress; press Ctrl-C again to stop at once", file=sys.stderr)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
