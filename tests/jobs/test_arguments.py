"""A mistake on the command line gives a one-line error at any width of the terminal."""

import os
from dataclasses import dataclass
from typing import Annotated

import pytest
import tyro

from maelstream.jobs.arguments import parse_arguments
from maelstream.shards.errors import MaelstreamError


@dataclass(frozen=True)
class Command:
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """The input; a sentence that a narrow terminal wraps over several lines of the box."""
    batch_size: int = 8
    """Images."""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a", "--batch-size", "many"], "Error parsing --batch-size: .*'many'"),
        (["a", "--batchsize", "3"], "Unrecognized options: --batchsize, 3; the nearest is --batch-size"),
        (["a", "--batch-size", "/a/very/long/word" * 8], f"{'/a/very/long/word' * 8}'"),
        ([], "Missing from maelstream do: DATA The input"),
    ],
)
def test_a_mistake_gives_one_line(args: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(MaelstreamError, match=message) as caught:
        parse_arguments(Command, args, "do")
    assert str(caught.value).endswith("; see `maelstream do --help`")
    assert not set("\n│─\x1b") & set(str(caught.value)) and os.environ["COLUMNS"] == "40"


def test_given_arguments_override_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert parse_arguments(Command, ["b"], "do", Command("a", 3)) == Command("b", 3) and "COLUMNS" not in os.environ


def test_help_fits_the_width_of_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as end:
        parse_arguments(Command, ["--help"], "do")
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "--batch-size" in printed and max(map(len, printed.splitlines())) <= 60


def test_help_without_a_width_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    with pytest.raises(SystemExit):
        parse_arguments(Command, ["--help"], "do")
    assert "usage: maelstream do" in capsys.readouterr().out and "COLUMNS" not in os.environ
