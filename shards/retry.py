"""Time limits and retries for reads from a store, disk or server that fails or does not answer.

Two environment variables set the limits of every command: MAELSTREAM_CONNECT_TIMEOUT_S (10 s without a value) and
MAELSTREAM_READ_TIMEOUT_S (30 s). With these values a read that never succeeds ends within 5 minutes.
"""

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from maelstream.shards.errors import DatasetError, StorageError

PAUSES_S = (0.1, 0.4, 1.6, 6.4, 25.6)
"""Seconds between attempts; there is one attempt more than pauses."""
_LAST_START_READS = 5
"""No attempt starts later than this many read time-outs after the first one."""
_MESSAGE_S = 1.0  # requests run in parallel and fail together: at most one message in this time

T = TypeVar("T")


def connect_timeout_s() -> float:
    """How long a connection may take to open."""
    return _seconds("MAELSTREAM_CONNECT_TIMEOUT_S", 10)


def read_timeout_s() -> float:
    """How long a server may send nothing while a read waits for it."""
    return _seconds("MAELSTREAM_READ_TIMEOUT_S", 30)


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        seconds = float(text or default)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise DatasetError(f"environment variable {name}={text!r}: give a number of seconds above 0")
    return seconds


class Attempts:
    """Counts the failures of one read, and says whether it is worth another attempt."""

    def __init__(self) -> None:
        self.failed = 0
        self._latest_start = time.monotonic() + _LAST_START_READS * read_timeout_s()

    def wait(self, error: StorageError) -> None:
        """Says on stderr what failed and waits before the next attempt.

        Raises:
            StorageError: this was the last attempt.
        """
        self.failed += 1
        if self.failed > len(PAUSES_S) or time.monotonic() > self._latest_start:
            times = "once" if self.failed == 1 else f"{self.failed} times"
            raise StorageError(f"{error}; tried {times}") from None
        pause_s = PAUSES_S[self.failed - 1]
        _say(f"{error}; next attempt in {pause_s:g} s ({self.failed + 1} of {len(PAUSES_S) + 1})")
        time.sleep(pause_s)


def read_with_retries(read: Callable[[], T]) -> T:
    """Calls `read`, again after growing pauses while it raises StorageError, and returns its result.

    Raises:
        StorageError: every attempt failed.
    """
    attempts = Attempts()
    while True:
        try:
            return read()
        except StorageError as error:
            attempts.wait(error)


def within(limit_s: float, call: Callable[[], T]) -> T:
    """Result of `call`, which runs in another thread because pyarrow's calls cannot be interrupted.

    Raises:
        TimeoutError: it takes longer than `limit_s`; its thread is abandoned. Otherwise what `call` raises.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="storage request", daemon=True).start()
    try:
        return outcome.result(limit_s)
    except TimeoutError:
        if outcome.done():
            raise
        raise TimeoutError(f"no complete answer within {limit_s:.0f} s") from None


_said = threading.Lock()
_last_message_s = -math.inf


def _say(message: str) -> None:
    global _last_message_s
    with _said:
        if time.monotonic() - _last_message_s < _MESSAGE_S:
            return
        _last_message_s = time.monotonic()
    with suppress(OSError, ValueError):  # stderr may be closed; the read goes on
        print(f"maelstream: {message}", file=sys.stderr, flush=True)
