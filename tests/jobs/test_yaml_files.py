"""YAML is read by the rules of version 1.2; repeated keys, anchors, deep nesting and odd files are one line."""

import math
import os
from pathlib import Path
from typing import Any

import pytest

from maelstream.jobs.recipe import RecipeError, load_recipe
from maelstream.jobs.yaml_files import YamlError, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("y", "y"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("1e-4", 1e-4),
        ("1.5E3", 1500.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("+12", 12),
        ("0b", "0b"),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2020-01-01", "2020-01-01"),
        ("2020-13-01", "2020-13-01"),
        ("'1e-4'", "1e-4"),
        ("=", "="),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(f"key: {text}")["key"]
    assert found == value and type(found) is type(value)


def test_on_is_a_key() -> None:
    assert parse_yaml("loader: {decode: {on: cpu}}") == {"loader": {"decode": {"on": "cpu"}}}
    assert math.isnan(parse_yaml(".nan"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key a is given twice"),
        ("x: {a: 1, a: 1}", "line 1: the key a is given twice"),
        ("a: &x [1]\nb: *x", "line 2: anchors and aliases are not read"),
        ("[" * 100 + "]" * 100, "more than 50 levels of nesting"),
        ("? [1, 2]\n: 3", "line 1: a key must be a text or a number"),
        ("a: [", "it is not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "it is not YAML"),
        ("a: !!timestamp x", "it is not YAML"),
    ],
)
def test_what_would_be_misread_is_one_line(text: str, reason: str) -> None:
    with pytest.raises(YamlError, match=reason) as raised:
        parse_yaml(text)
    assert "\n" not in str(raised.value)


def test_nested_aliases_are_refused_before_they_grow() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(YamlError, match="anchors and aliases are not read"):
        parse_yaml("\n".join(lines))


def test_odd_files_are_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"a: \xff")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(11 * 2**20)
    for path, reason in {
        tmp_path / "pipe": "it is not a regular file",
        Path("/dev/zero"): "it is not a regular file",
        tmp_path: "s a directory",
        tmp_path / "binary": "it is not UTF-8 .*at byte 3",
        tmp_path / "large": "more than 10,485,760",
        tmp_path / "missing": "No such file",
    }.items():
        with pytest.raises(YamlError, match=reason):
            read_yaml(path)


def test_a_recipe_with_on_and_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("data: {dataset: ~/data}\n")
    (tmp_path / "mine.yaml").write_text("base: ~/base.yaml\nloader: {decode: {on: cpu}}\noptim: {base_lr: 1e-4}\n")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert (recipe.loader.decode.on, recipe.optim.base_lr) == ("cpu", 1e-4)
    assert recipe.data.dataset == str(tmp_path / "data")


@pytest.mark.parametrize("base", ["1", "[a.yaml]", "{a: b}", "true"])
def test_a_base_of_another_type_is_one_line(tmp_path: Path, base: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"base: {base}\n")
    with pytest.raises(RecipeError, match="base must be the path of a recipe"):
        load_recipe(tmp_path / "mine.yaml")
