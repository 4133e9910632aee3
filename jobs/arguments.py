"""Parses command lines with tyro, and turns its multi-line error boxes into one line."""

import contextlib
import difflib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import tyro
import tyro._strings

from maelstream.shards.durable import can_write
from maelstream.shards.errors import MaelstreamError

T = TypeVar("T")

_RULE = re.compile(r"[─╭╮╰╯]{2,}|-{10,}")  # tyro draws with hyphens if stdout is not UTF-8
_PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps")  # what matplotlib writes
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def _joined_lines(helptext: str) -> str:
    """The text with each paragraph on one line."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", helptext))


# tyro 1.0 keeps the line breaks of a docstring below a field: it joins only lines that are not indented.
setattr(tyro._strings, "remove_single_line_breaks", _joined_lines)  # noqa: B010  mypy rejects another function


def parse_arguments(schema: type[T], args: list[str], command: str, default: T | None = None) -> T:
    """The arguments of `maelstream COMMAND` as an instance of the dataclass `schema`.

    Raises:
        MaelstreamError: an argument is unknown, missing or cannot be parsed.
        SystemExit: `--help` is among the arguments; the help has been printed.
    """
    # A shell replaces ~ only at the start of a word, not in --run=~/runs.
    args = [re.sub(r"(?<==)~(?=/)", os.path.expanduser("~"), arg) if arg.startswith("--") else arg for arg in args]
    prog = f"maelstream {command}"
    if asks_for_help(args):
        return _cli(schema, ["--help"], prog, default)  # tyro would report another argument that is wrong
    box = io.StringIO()
    try:
        # tyro wraps lines at the terminal's width, which would split long values
        with contextlib.redirect_stderr(box), _columns("10000"):
            return _cli(schema, args, prog, default)
    except SystemExit as end:
        if end.code != 2:
            raise
    message = _one_line(box.getvalue())
    if message.startswith("Unrecognized options: --"):
        message += _nearest(message.split()[2].strip(",").partition("=")[0], _option_names(schema, prog, default))
    raise MaelstreamError(f"{message}; see `{prog} --help`")


def asks_for_help(args: list[str]) -> bool:
    """Whether `args` ask for the command's help, which prints the defaults and then ends the process."""
    return bool({"-h", "--help"} & set(args))


def option_value(args: list[str], name: str) -> str | None:
    """The value of an option that is needed before the others can be parsed; None if it is not in `args`."""
    for index, arg in enumerate(args):
        if arg == name and index + 1 < len(args):
            return args[index + 1]
        if arg.startswith(f"{name}="):
            return arg.partition("=")[2]
    return None


def check_output_file(option: str, file: Path) -> None:
    """Raises a MaelstreamError if `file`, which `option` names, cannot be written; called before a command's work."""
    folder = file.absolute().parent
    if not folder.is_dir():
        reason = f"there is no folder {file.parent}"
    elif file.is_dir():
        reason = "it is a folder; give the name of a file"
    elif not can_write(folder) or (file.exists() and not os.access(file, os.W_OK)):
        reason = "permission denied"
    else:
        return
    raise MaelstreamError(f"{option} {file} cannot be written ({reason})")


def check_output_folder(option: str, folder: Path) -> None:
    """Raises a MaelstreamError if files cannot be written below `folder`, which `option` names; it need not exist."""
    if not can_write(folder):
        raise MaelstreamError(f"{option} {folder} cannot be written (permission denied, or part of it is a file)")


def make_folder(option: str, file: Path) -> None:
    """Makes the folder of `file`, which `option` names; MaelstreamError if that is not possible."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MaelstreamError(f"{option} {file} cannot be written ({error.strerror})") from None


def check_picture_file(option: str, file: Path) -> None:
    """As `check_output_file`, for a picture, whose format follows from the suffix of its name."""
    check_output_file(option, file)
    if file.suffix.lower() not in _PICTURES:
        raise MaelstreamError(f"{option} {file} cannot be written (its name must end in {', '.join(_PICTURES)})")


def _cli(schema: type[T], args: list[str], prog: str, default: T | None) -> T:
    given = {} if default is None else {"default": default}
    return tyro.cli(schema, args=args, prog=prog, **given)  # type: ignore[call-overload]


@contextlib.contextmanager
def _columns(width: str) -> Iterator[None]:
    """Sets the width of the terminal that tyro reads."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = width
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _one_line(box: str) -> str:
    """The text of an error box up to its first horizontal rule."""
    lines: list[str] = []
    for line in _COLOUR.sub("", box).splitlines()[1:]:  # without the title
        if not _RULE.match(line := line.strip("│ ")):
            lines.append(line)
        elif lines:
            break
    return " ".join(" ".join(lines).split()).rstrip(".").replace("Error parsing recipe.", "Error parsing ")


def _option_names(schema: type, prog: str, default: Any) -> list[str]:
    """The names of all options, as the help lists them."""
    printed = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(printed), _columns("100"):
        _cli(schema, ["--help"], prog, default)
    listed = re.findall(r"^[│ ] (--?[a-z].*?)(?:  |$)", _COLOUR.sub("", printed.getvalue()), re.MULTILINE)
    return list(dict.fromkeys(re.findall(r"--[a-z][\w.-]*", " ".join(listed))))


def _nearest(wrong: str, names: list[str]) -> str:
    """The known options that a wrong one may mean: those of the same last part (`batch-size`), or the most similar."""
    last_parts = {name: name.removeprefix("--").rpartition(".")[2] for name in (wrong, *names)}
    nearest = difflib.get_close_matches(last_parts[wrong].replace("_", "-"), [last_parts[name] for name in names], 1)
    near = [name for name in names if last_parts[name] in nearest] or difflib.get_close_matches(wrong, names, 1)
    return f"; the nearest is {' or '.join(near)}" if near else ""
