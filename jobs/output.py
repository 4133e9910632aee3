"""stdout and stderr that never end a training run: not when the reader has gone (`| head -1`), not on a full disk.

A command whose output is its whole result ends instead, silently or with one line.
"""

import io
import sys
from typing import Any, TextIO

_WRITES_ELSEWHERE = {
    "pretrain",
    "finetune",
    "linprobe",
    "partial",
    "scratch",
    "launch",
    "sweep",
    "demo",
    "pack",
    "index",
}
"""Commands whose result is a folder: they go on without a terminal."""


def guard_output(command: str) -> None:
    """Replaces `sys.stdout` and `sys.stderr` for `command`. Letters that the terminal does not have become "?"."""
    if type(sys.stdout) is io.TextIOWrapper:
        sys.stdout = _guarded(sys.stdout, goes_on=command in _WRITES_ELSEWHERE)
    if type(sys.stderr) is io.TextIOWrapper:
        sys.stderr = _guarded(sys.stderr, goes_on=True)


def flush_output() -> None:
    """Writes what is buffered. OSError if stdout cannot be written and the command does not go on without it."""
    if sys.stdout is not None:
        sys.stdout.flush()


def stdout_failed() -> bool:
    """Whether stdout could not be written; what is buffered for it is then discarded, so that Python can end."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return isinstance(raw, _File) and raw.failed


def _guarded(old: io.TextIOWrapper, goes_on: bool) -> TextIO:
    old.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_File(old.fileno(), goes_on)),
        encoding=old.encoding,
        errors="replace",
        line_buffering=old.line_buffering,
        write_through=old.write_through,
    )


class _File(io.FileIO):
    """A file descriptor. The first failure raises OSError unless `goes_on`; after it, everything is discarded."""

    def __init__(self, descriptor: int, goes_on: bool):
        super().__init__(descriptor, "wb", closefd=False)
        self._goes_on, self.failed = goes_on, False

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.failed:
            return size
        try:
            return super().write(data)
        except OSError as error:
            self.failed = True
            if not self._goes_on:
                raise
            if self.fileno() == 1 and not isinstance(error, BrokenPipeError):
                print(f"maelstream: stdout cannot be written ({error.strerror}); going on without it", file=sys.stderr)
            return size
