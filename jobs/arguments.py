"""Parses command lines with tyro, and turns its multi-line error boxes into one line."""

import contextlib
import io
import os
import re
from typing import TypeVar

import tyro

from maelstream.shards.errors import MaelstreamError

T = TypeVar("T")

_RULE = re.compile(r"[─╭╮╰╯]{2,}")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def parse_arguments(schema: type[T], args: list[str], command: str, default: T | None = None) -> T:
    """The arguments of `maelstream COMMAND` as an instance of the dataclass `schema`.

    Raises:
        MaelstreamError: an argument is unknown, missing or cannot be parsed.
        SystemExit: `--help` is among the arguments; the help has been printed.
    """
    given = {} if default is None else {"default": default}
    # A shell replaces ~ only at the start of a word, not in --run=~/runs.
    args = [re.sub(r"(?<==)~(?=/)", os.path.expanduser("~"), arg) if arg.startswith("--") else arg for arg in args]
    box, before = io.StringIO(), os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(args):
        os.environ["COLUMNS"] = "10000"  # tyro wraps lines at this width, and would split long values
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(schema, args=args, prog=f"maelstream {command}", **given)  # type: ignore[call-overload]
    except SystemExit as end:
        if end.code != 2:
            raise
        raise MaelstreamError(f"{_one_line(box.getvalue())}; see `maelstream {command} --help`") from None
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def option_value(args: list[str], name: str) -> str | None:
    """The value of an option that is needed before the others can be parsed; None if it is not in `args`."""
    for index, arg in enumerate(args):
        if arg == name and index + 1 < len(args):
            return args[index + 1]
        if arg.startswith(f"{name}="):
            return arg.partition("=")[2]
    return None


def _one_line(box: str) -> str:
    """The text of an error box up to its first horizontal rule, and the nearest option if the box suggests one."""
    sections: list[list[str]] = [[]]
    for line in _COLOUR.sub("", box).splitlines()[1:]:  # without the title
        if _RULE.match(line := line.strip("│ ")):
            sections.append([])
        else:
            sections[-1].append(line)
    message = " ".join(" ".join(sections[0]).split()).rstrip(".")
    near = sections[1][1].split() if len(sections) > 1 and sections[1][:1] == ["Perhaps you meant:"] else []
    return f"{message}; the nearest is {near[0]}" if near else message
