"""A mistake on the command line gives a one-line error at any width of the terminal."""

import io
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import tyro

from maelstream.jobs.arguments import check_output_file, check_picture_file, parse_arguments
from maelstream.jobs.recipe import ClassificationRecipe, Recipe
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


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize("args", [["a", "--batchsize", "3"], ["a", "--batch-size", "many"], []])
def test_a_mistake_gives_the_same_line_on_any_terminal(
    args: list[str], encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MaelstreamError) as here:
        parse_arguments(Command, args, "do")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(MaelstreamError) as there:
        parse_arguments(Command, args, "do")
    assert str(there.value) == str(here.value) and "----" not in str(there.value)


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


@dataclass(frozen=True)
class OfRecipe:
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    steps: int = 1
    """Steps; a text of two lines in the source, which the help prints as one paragraph however wide the terminal is. A
    second sentence."""


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("--batch-size", "--optim.batch-size"),
        ("--batch_size", "--optim.batch-size"),
        ("--batchsize", "--optim.batch-size"),
        ("--model.epochs", "--optim.epochs"),
        ("--mask-ratios", "--model.mask-ratio"),
        ("--optim.epoch", "--optim.epochs"),
        ("--every-steps", "--log.every-steps or --checkpoint.every-steps"),
        ("--no-wandb-log", "--log.no-wandb"),
        ("--step", "--steps"),
    ],
)
@pytest.mark.parametrize("given", [" 3", "=3"])
def test_an_unknown_option_names_those_of_the_nearest_last_part(option: str, nearest: str, given: str) -> None:
    with pytest.raises(MaelstreamError, match=f"the nearest is {nearest}; see"):
        parse_arguments(OfRecipe, f"{option}{given}".split(), "do", OfRecipe(Recipe()))


def test_an_unknown_option_like_no_other_names_none() -> None:
    with pytest.raises(MaelstreamError, match=r"^Unrecognized options: --qqq, 3; see"):
        parse_arguments(OfRecipe, ["--qqq", "3"], "do", OfRecipe(Recipe()))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--optim.batch-size", "0"], "Error parsing optim: batch_size 0 is not positive; see"),
        (["--model.dim", "7"], "Error parsing model: heads 12 does not divide dim 7; see"),
    ],
)
def test_a_wrong_value_of_a_recipe_is_named_as_its_options_are(args: list[str], message: str) -> None:
    with pytest.raises(MaelstreamError, match=f"^{message}"):
        parse_arguments(OfRecipe, args, "do", OfRecipe(Recipe()))


def help_of(schema: type, default: Any, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        parse_arguments(schema, ["--help"], "do", default)
    return capsys.readouterr().out


def test_the_help_breaks_lines_at_the_width_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = [line.strip("│ ") for line in help_of(OfRecipe, OfRecipe(Recipe()), capsys).splitlines()]
    assert "Steps; a text of two lines in the source, which the help prints as one paragraph however" in lines
    assert "wide the terminal is. A second sentence. (default: 1)" in lines


def test_the_help_shows_the_values_of_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    printed = help_of(OfRecipe, OfRecipe(Recipe(seed=4321), steps=77), capsys)
    assert "(default: 4321)" in printed and "(default: 77)" in printed and "(required)" not in printed


@dataclass(frozen=True)
class OfLabels:
    recipe: Annotated[ClassificationRecipe, tyro.conf.arg(name="")]


@pytest.mark.parametrize("command", [OfRecipe(Recipe()), OfLabels(ClassificationRecipe())], ids=["images", "labels"])
def test_every_key_of_a_recipe_has_a_help_text(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    printed = help_of(type(command), command, capsys)
    options = re.split(r"^[│ ] (?=--?[a-z])", printed, flags=re.MULTILINE)[1:]
    assert len(options) > 50
    assert not [
        option for option in options if not re.search(r"[a-z;.)][ \n│|]*\(default", option) and "--help" not in option
    ]


def test_an_output_file_is_checked_before_the_work(tmp_path: Path) -> None:
    check_output_file("--out", tmp_path / "new.png")
    (tmp_path / "old.png").touch()
    check_output_file("--out", tmp_path / "old.png")
    for file, reason in (
        (tmp_path, "it is a folder"),
        (tmp_path / "nowhere" / "a.png", "there is no folder"),
        (tmp_path / "old.png" / "a.png", "there is no folder"),
    ):
        with pytest.raises(MaelstreamError, match=f"^--out {re.escape(str(file))} cannot be written .*{reason}"):
            check_output_file("--out", file)


def test_the_format_of_a_picture_is_checked_before_the_work(tmp_path: Path) -> None:
    for name in ("a.png", "a.SVG", "a.b.pdf"):
        check_picture_file("--out", tmp_path / name)
    for name in ("a.txt", "a", "png"):
        with pytest.raises(MaelstreamError, match=r"its name must end in \.png, "):
            check_picture_file("--out", tmp_path / name)
    with pytest.raises(MaelstreamError, match="there is no folder"):
        check_picture_file("--out", tmp_path / "no" / "a.png")
