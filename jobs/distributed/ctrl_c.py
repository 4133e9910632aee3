"""Ctrl-C ends a command with one line and exit code 130. Importing this module sets it up, before slow imports.

It does so for the program `maelstream` alone: another program that imports a command keeps its own handler.
"""

import os
import signal
import sys
from types import FrameType

_IMPORTING = ("importlib._bootstrap", "_frozen_importlib")  # names of one module, before and after `import importlib`


def handle_ctrl_c() -> None:
    """Sets the handler; a process that ignores Ctrl-C, such as a job in the background, continues to do so."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _on_ctrl_c)


def report_ctrl_c() -> None:
    """Prints one line on stderr, by rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"\nmaelstream: stopped by Ctrl-C\n")


def _on_ctrl_c(number: int, frame: FrameType | None) -> None:
    """Ends the process at once during an import, where there is nothing to clean up; otherwise the command cleans up.

    Packages catch the KeyboardInterrupt of an import of theirs: numpy then imports itself until the stack is full.
    """
    while frame is not None:
        if frame.f_globals.get("__name__") in _IMPORTING:
            report_ctrl_c()
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


if os.path.basename(sys.argv[0]) in ("maelstream", "command.py"):
    handle_ctrl_c()
