"""`maelstream tune` on a tiny recipe, with real trials; bad options."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from maelstream.jobs.command import run
from maelstream.jobs.profiling.settings_search import Axis
from maelstream.jobs.profiling.trial import main
from maelstream.jobs.recipe import load_recipe
from maelstream.shards.dataset import Dataset
from tests.helpers.forked import CONTEXT


@pytest.fixture
def tiny(packed: Dataset, tmp_path: Path) -> Path:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"data: {{dataset: {packed.folder}}}\n"
        "model: {image_size: [32, 32], patch_size: 8, dim: 48, depth: 1, heads: 3, decoder_dim: 32, decoder_depth: 1,\n"
        "        decoder_heads: 4}\n"
        "optim: {batch_size: 16}\nengine: {micro_batch_size: 2}\n"
    )
    return recipe


def _trial(path: str, seconds: str, output: Path) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
    main(path, seconds)
    sys.stdout.flush()


def test_a_tiny_recipe_is_tuned_with_real_trials(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def forked(command: list[str], **_: object) -> subprocess.CompletedProcess:
        """The trial in a forked process, which saves the seconds of imports."""
        assert command[:3] == [sys.executable, "-m", "maelstream.jobs.profiling.trial"]
        process = CONTEXT.Process(target=_trial, args=(*command[3:], tiny.with_name("output")))
        process.start()
        process.join()
        return subprocess.CompletedProcess(command, process.exitcode or 0, tiny.with_name("output").read_text(), "")

    monkeypatch.setattr(subprocess, "run", forked)
    micro_batches = Axis("engine.micro_batch_size", (2, 16), True)
    monkeypatch.setattr("maelstream.jobs.tune.axes_of", lambda *_: [micro_batches])
    monkeypatch.setattr("maelstream.jobs.profiling.settings_search.ROUNDS", 1)
    assert run("tune", [str(tiny), "--minutes", "5", "--trial-seconds", "0.2"]) == 0
    out = tiny.with_name("tiny.tuned.yaml")
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 settings tried" in printed and f"written to {out}" in printed
    values = yaml.safe_load(out.read_text())
    assert values["base"] == "tiny.yaml" and values.keys() <= {"base", "engine"}
    # Eight micro-batches of two images, each with a dozen kernel starts, against one of sixteen.
    assert load_recipe(out).engine.micro_batch_size == 16 and "times as fast (medians of" in printed


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (lambda recipe: ["--minutes", "0"], "more than 0"),
        (lambda recipe: ["--out", str(recipe)], "is the recipe itself"),
        (lambda recipe: ["--out", str(recipe.parent / "no" / "x.yaml")], "there is no folder"),
    ],
)
def test_bad_options_are_one_line(
    tiny: Path, capsys: pytest.CaptureFixture[str], options: Callable[[Path], list[str]], complaint: str
) -> None:
    assert run("tune", [str(tiny), *options(tiny)]) == 2
    assert complaint in capsys.readouterr().err
