"""Health checks of a run: steps with NaN or Inf, loss spikes, and ranks that make no progress."""

import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from maelstream.jobs.distributed.errors import AgreedError
from maelstream.shards.errors import MaelstreamError

SILENT = 70  # exit code of a rank whose watchdog reports a rank without progress
_HISTORY = 50  # losses
_BEATS_BYTES = 40


class DivergedError(AgreedError):
    """Training produces NaN or Inf and cannot continue."""


class BadSteps:
    """Counts consecutive steps that were skipped because of NaN or Inf."""

    def __init__(self, limit: int):
        self._limit, self._in_a_row = limit, 0

    def note(self, skipped: bool, step: int, last_good: str) -> None:
        """Counts a step; raises DivergedError if it is the `limit`-th skipped one in a row.

        The message names `last_good`, the checkpoint to resume from.
        """
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row == self._limit:
            raise DivergedError(
                f"NaN or Inf in {self._limit} steps in a row, up to step {step}: the weights are as they were before; "
                f"the last good checkpoint is {last_good}. Lower optim.base_lr, set optim.clip_grad, look at the data"
            )


class Spikes:
    """Flags losses that are many times the recent median."""

    def __init__(self, times: float):
        self._times = times
        self._last: deque[float] = deque(maxlen=_HISTORY)

    def note(self, loss: float) -> bool:
        """Whether the loss of the next step is a spike: more than `times` the median of the 50 losses before it.

        The first 50 losses after a start are never spikes.
        """
        spike = len(self._last) == _HISTORY and loss > self._times * statistics.median(self._last)
        self._last.append(loss)
        return spike


class Watchdog:
    """Ends this rank if no rank makes progress for `silent_s` seconds, and reports which rank is stuck.

    Use it as a context manager. The main thread calls `heartbeat` whenever it makes progress. A thread writes the
    number of heartbeats into one file per rank. All hosts see these files, so they survive a rank that ends.
    """

    def __init__(
        self, folder: Path, rank: int, world_size: int, silent_s: float, end: Callable[[str], None] | None = None
    ):
        """`end` is called with the report instead of ending the process; for tests."""
        self._folder, self._rank, self._world_size, self._silent_s = folder, rank, world_size, silent_s
        self._end = end or _exit
        self._beats = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watchdog":
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MaelstreamError(
                f"{self._folder} cannot be made ({error.strerror}); make space or repair it"
            ) from None
        self._write(0)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def heartbeat(self) -> None:
        """Counts progress of the main thread; all ranks call it at the same points of training."""
        self._beats += 1

    def _run(self) -> None:
        ticks, beats, since = 0, self._beats, time.monotonic()
        then: dict[int, tuple[str, str]] = {}
        while not self._over.wait(self._silent_s / 20):
            ticks += 1
            self._write(ticks)
            waited_s = time.monotonic() - since
            if self._beats != beats:
                beats, since, then = self._beats, time.monotonic(), {}
            elif waited_s > self._silent_s / 2 and not then:
                then = self._read()
            elif waited_s > self._silent_s and then:
                now = self._read()
                if any(now[rank][0] != then[rank][0] for rank in now):  # a rank makes progress, so all will
                    since, then = time.monotonic(), {}
                    continue
                stopped = [rank for rank in now if now[rank] == then[rank] and rank != self._rank]
                least = min(int(count) for count, _ in now.values())
                behind = [rank for rank in now if int(now[rank][0]) == least]
                names = ", ".join(map(str, stopped or behind))
                what = "their processes are stopped" if stopped else "the others have come further"
                if not stopped and len(behind) == self._world_size:
                    what = "all ranks wait at the same point"
                self._end(f"rank {names}: silent for {self._silent_s:g} s ({what}); this run ends")
                return

    def _write(self, ticks: int) -> None:
        # In place and of one length: a full disk takes it, and no other rank reads an empty file.
        with suppress(OSError):  # this thread must not end; the run says what cannot be written
            file = os.open(self._folder / f"{self._rank:05d}", os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.pwrite(file, f"{self._beats} {ticks}".ljust(_BEATS_BYTES).encode(), 0)
            finally:
                os.close(file)

    def _read(self) -> dict[int, tuple[str, str]]:
        """Heartbeats and ticks of the watchdog thread by rank, as text."""
        found: dict[int, tuple[str, str]] = {}
        for rank in range(self._world_size):
            parts: list[str] = []
            with suppress(OSError, ValueError):
                parts = (self._folder / f"{rank:05d}").read_text().split()
            # A rank that has not started has no file yet; on a full disk the file is empty.
            found[rank] = (parts[0], parts[1]) if len(parts) == 2 and all(map(str.isdecimal, parts)) else ("0", "0")
        return found


def _exit(what: str) -> None:
    print(f"maelstream: {what}", file=sys.stderr, flush=True)
    os._exit(SILENT)
