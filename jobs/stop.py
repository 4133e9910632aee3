"""SIGTERM, SIGUSR1 and Ctrl-C: the step is finished and saved, then the run ends with its own exit code."""

import os
import signal
import sys
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stop:
    """Notes the signals that ask for an end; use it as a context manager, in the main thread.

    Whoever does not reach the end within `grace_s` is ended where it stands, with the same code: what is on the disk
    stays whole. A second Ctrl-C, a second later at the earliest, ends it at once.
    """

    def __init__(self, grace_s: float):
        self._grace_s = grace_s
        self._received: signal.Signals | None = None
        self._at = 0.0
        self._deadline: threading.Timer | None = None

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def signs(self) -> list[float]:
        """For each of `SIGNALS`, 1 when this rank received it."""
        return [float(self._received is number) for number in SIGNALS]

    @staticmethod
    def agreed(sums: list[float]) -> signal.Signals | None:
        """The signal that some rank received, given the sums of all `signs`."""
        return next((number for number, count in zip(SIGNALS, sums, strict=True) if count), None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            if number == signal.SIGINT and time.monotonic() - self._at > 1:
                os._exit(128 + number)
            return
        self._received, self._at = signal.Signals(number), time.monotonic()
        self._deadline = threading.Timer(self._grace_s, os._exit, [128 + number])
        self._deadline.daemon = True
        self._deadline.start()
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{self._received.name}: finishing the step, saving, then stopping", file=sys.stderr)
