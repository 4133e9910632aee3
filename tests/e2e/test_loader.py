"""`maelstream loader` as a user types it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maelstream.jobs.command import run
from maelstream.shards.dataset import Dataset


def test_it_prints_rates_and_the_limit_and_writes_what_the_model_will_see(
    packed: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "grid.png"
    options = ["--seconds", "0.4", "--batch-size", "8", "--image-size", "32", "--save-grid", str(grid)]
    assert run("loader", [packed.folder, *options]) == 0
    printed = capsys.readouterr().out
    for word in ("draws", "read", "decode and resize", "whole", "MB/s", "the limit: "):
        assert word in printed
    with Image.open(grid) as picture:
        assert picture.size == (8 * 32, 8 * 32)
        pixels = np.asarray(picture)
    assert (pixels[7 * 32 :, 4 * 32 :] == 255).all() and pixels[: 7 * 32].std() > 30  # 60 images in 64 cells


def test_the_figures_as_json(packed: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("loader", [packed.folder, "--seconds", "0.4", "--batch-size", "8", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["limit"] in figures["images_per_s"] and all(rate > 0 for rate in figures["images_per_s"].values())


def test_the_crop_and_the_image_size_come_from_the_recipe(
    packed: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {crop: {kind: none}, shuffle: none}\nmodel: {image_size: [16, 48], patch_size: 8}\n")
    grid = tmp_path / "grid.png"
    options = ["--recipe", str(recipe), "--seconds", "0.2", "--batch-size", "8", "--save-grid", str(grid)]
    assert run("loader", [packed.folder, *options]) == 0
    with Image.open(grid) as picture:
        assert picture.size == (8 * 48, 8 * 16)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--threads", "0"], "are at least 1"),
        (["--seconds", "0"], "--seconds is more than 0"),
        (["--recipe", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["--save-grid", "nowhere/x.png"], "nowhere/x.png cannot be written"),
    ],
)
def test_bad_options_are_one_line(
    packed: Dataset, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    assert run("loader", [packed.folder, "--batch-size", "8", *options]) == 2
    assert complaint in capsys.readouterr().err
