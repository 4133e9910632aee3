"""Command lines by tyro, whose box of a mistake becomes one line."""

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


def parsed(schema: type[T], args: list[str], command: str, default: T | None = None) -> T:
    """The arguments of `maelstream COMMAND` as a `schema`; with --help its help, and the end of the process.

    Raises:
        MaelstreamError: arguments that are none of the command's, that are missing, or that cannot be read.
    """
    given = {} if default is None else {"default": default}
    box, before = io.StringIO(), os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(args):
        os.environ["COLUMNS"] = "10000"  # so that no value is wrapped in its middle
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(schema, args=args, prog=f"maelstream {command}", **given)  # type: ignore[call-overload]
    except SystemExit as end:
        if end.code != 2:
            raise
        raise MaelstreamError(f"{_line_of(box.getvalue())}; see `maelstream {command} --help`") from None
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def _line_of(box: str) -> str:
    """What a box says before its first rule, and the nearest option if it tells one behind that."""
    sections: list[list[str]] = [[]]
    for line in _COLOUR.sub("", box).splitlines()[1:]:  # without the title
        if _RULE.match(line := line.strip("│ ")):
            sections.append([])
        else:
            sections[-1].append(line)
    said = " ".join(" ".join(sections[0]).split()).rstrip(".")
    near = sections[1][1].split() if len(sections) > 1 and sections[1][:1] == ["Perhaps you meant:"] else []
    return f"{said}; the nearest is {near[0]}" if near else said
