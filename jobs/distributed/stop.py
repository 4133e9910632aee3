"""Signals that stop training: the step is finished and saved, then the run ends with its own exit code.

SIGTERM and SIGUSR1 come from schedulers, SIGINT from Ctrl-C, SIGHUP from a closed terminal, and SIGXCPU from a limit of
CPU time.
"""

import os
import signal
import sys
import threading
import time

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)


def handled_signals() -> list[signal.Signals]:
    """Those of `SIGNALS` that this process does not ignore: nohup has SIGHUP ignored."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


class Stop:
    """Records the signals that stop training; a context manager for the main thread.

    Until `defer` is called there is nothing to save, and a signal ends the process at once. Afterwards the process has
    `grace_s` seconds to finish the step and save. Then it ends with the same exit code; files on disk stay complete.
    A second Ctrl-C that comes at least one second after the first ends it at once.

    A thread receives the signals, because Python runs signal handlers between two instructions of the main thread, and
    the main thread may wait in C++ for other ranks forever.
    """

    def __init__(self, grace_s: float):
        self._grace_s = grace_s
        self._deferred = False
        self._received: signal.Signals | None = None
        self._received_at = 0.0

    def __enter__(self) -> "Stop":
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        self._before = {number: signal.signal(number, lambda *_: None) for number in handled_signals()}
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

    def defer(self) -> None:
        """From now on a signal lets the step finish and save."""
        self._deferred = True

    @property
    def received(self) -> signal.Signals | None:
        """The first of `SIGNALS` that this rank received."""
        return self._received

    def _listen(self) -> None:
        while numbers := os.read(self._reading, 1):
            if numbers[0] in SIGNALS:
                self._record(signal.Signals(numbers[0]))

    def _record(self, number: signal.Signals) -> None:
        if not self._deferred:
            os._exit(128 + number)
        if self._received is not None:
            if number == signal.SIGINT and time.monotonic() - self._received_at > 1:
                os._exit(128 + number)
            return
        self._received, self._received_at = number, time.monotonic()
        if number == signal.SIGHUP:
            self._leave_terminal()
        deadline = threading.Timer(self._grace_s, os._exit, [128 + number])
        deadline.daemon = True
        deadline.start()
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{number.name}: finishing the step, saving, then stopping", file=sys.stderr, flush=True)

    def _leave_terminal(self) -> None:
        """Sends output to /dev/null: writing to a closed terminal raises, and the run has yet to be saved."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nothing, descriptor)
        os.close(nothing)
