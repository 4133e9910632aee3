"""`maelstream loader` as a user types it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maelstream.jobs.arguments import parse_arguments
from maelstream.jobs.command import run
from maelstream.jobs.loader import Loader, data_path_of, limit_text, measure_stages
from maelstream.jobs.profiling.data_stages import DataPath
from maelstream.shards.dataset import Dataset


def test_it_prints_rates_and_the_limit_and_writes_what_the_model_will_see(
    packed: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "new" / "folder" / "grid.png"
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
        (["--save-grid", f"{__file__}/x.png"], "x.png cannot be written (File exists"),
        (["--save-grid", "x.txt"], "--save-grid x.txt cannot be written (its name must end in .png"),
    ],
)
def test_bad_options_are_one_line(
    packed: Dataset, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    assert run("loader", [packed.folder, "--batch-size", "8", *options]) == 2
    assert complaint in capsys.readouterr().err


def test_a_whole_that_is_faster_than_its_slowest_stage_is_explained() -> None:
    rates = {"read": 900.0, "decode and resize": 284.0, "whole": 414.0}
    text = limit_text({"images_per_s": rates, "limit": "decode and resize", "spread": 0.8})
    assert "decode and resize, although the whole was measured 46% faster: rates differed by up to 80%" in text
    assert limit_text({"images_per_s": rates | {"whole": 250.0}, "limit": "read", "spread": 0.8}) == "the limit: read"


def test_stages_are_measured_in_turns(packed: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """One turn of three is disturbed by another process; it changes no figure."""
    calls: list[str] = []

    def rate_of(name: str, rate: float) -> Callable[..., float]:
        def measured(*_: object) -> float:
            calls.append(name)
            return rate / 10 if calls.count(name) == 2 else rate

        return measured

    for name, rate in (("plan", 900.0), ("read", 500.0), ("decoder", 50.0)):
        monkeypatch.setattr(DataPath, f"{name}_rate", rate_of(name, rate))
    monkeypatch.setattr("maelstream.jobs.profiling.data_stages.measure_rate", rate_of("whole", 40.0))
    command = parse_arguments(Loader, [packed.folder, "--batch-size", "8"], "loader")
    figures = measure_stages(data_path_of(command), 1.0)
    assert calls == ["plan", "read", "decoder", "whole"] * 3
    assert figures["images_per_s"] == {"draws": 900, "read": 500, "decode and resize": 50, "whole": 40}
    assert figures["limit"] == "decode and resize" and figures["spread"] == 0.9
