"""SIGTERM, SIGUSR1 and Ctrl-C: the step is finished and saved, then the run ends with its own exit code."""

import os
import signal
import sys
import threading
import time

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stop:
    """Notes the signals that ask for an end; use it as a context manager, in the main thread.

    Until `training` is called there is nothing to save, and a signal ends the process at once. From then on whoever
    does not reach the end within `grace_s` is ended where it stands, with the same code: what is on the disk stays
    whole. A second Ctrl-C, a second later at the earliest, ends it at once.

    A thread notes them: Python runs handlers between two instructions of the main thread, which may be waiting for
    other ranks in C++ for good.
    """

    def __init__(self, grace_s: float):
        self._grace_s = grace_s
        self._training = False
        self._received: signal.Signals | None = None
        self._at = 0.0

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        signal.set_wakeup_fd(self._writing)
        self._thread = threading.Thread(target=self._listen, name="stop", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._writing)  # which ends the thread
        self._thread.join()
        os.close(self._reading)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def training(self) -> None:
        """From now on a signal waits for the step."""
        self._training = True

    @property
    def received(self) -> signal.Signals | None:
        """The first of `SIGNALS` that this rank received."""
        return self._received

    def _listen(self) -> None:
        while numbers := os.read(self._reading, 1):
            if numbers[0] in SIGNALS:
                self._note(signal.Signals(numbers[0]))

    def _note(self, number: signal.Signals) -> None:
        if not self._training:
            os._exit(128 + number)
        if self._received is not None:
            if number == signal.SIGINT and time.monotonic() - self._at > 1:
                os._exit(128 + number)
            return
        self._received, self._at = number, time.monotonic()
        deadline = threading.Timer(self._grace_s, os._exit, [128 + number])
        deadline.daemon = True
        deadline.start()
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{number.name}: finishing the step, saving, then stopping", file=sys.stderr, flush=True)
