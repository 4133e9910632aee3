"""Trials in processes of their own: how they end, what is printed, and what stops the search."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from maelstream.jobs.profiling.trial_runner import TrialRunner
from maelstream.jobs.recipe import RecipeError, load_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("optim: {batch_size: 16}\nengine: {micro_batch_size: 2}\n")
    return path


@pytest.mark.parametrize(
    ("code", "stdout", "stderr", "outcome"),
    [
        (-9, "", "", "out of memory"),
        (1, "", "Traceback\nRuntimeError: DefaultCPUAllocator: can't allocate memory: 9 bytes", "out of memory"),
        (0, 'a line of DeepSpeed\n{"failed": "out of memory"}\n', "", "out of memory"),
        (0, 'a line of DeepSpeed\n{"images_per_s": 7.0}\n', "", "7.00 images/s"),
    ],
)
def test_how_a_trial_ends_is_printed(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, code: int, stdout: str, stderr: str, outcome: str
) -> None:
    done = subprocess.CompletedProcess([], code, stdout, stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    runner = TrialRunner(load_recipe(recipe), 0.1, 60, Console(width=200))
    assert runner({"engine.micro_batch_size": 2}) == (7.0 if "7.0" in stdout else None)
    assert outcome in capsys.readouterr().out and runner.failures == ([] if "7.0" in stdout else [outcome])


def test_a_recipe_that_cannot_run_at_all_ends_the_search(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [subprocess.CompletedProcess([], 0, '{"images_per_s": 7.0}', "")]
    failed = subprocess.CompletedProcess([], 1, "", "warning\nDatasetError: nowhere is no dataset")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: results.pop() if results else failed)
    setting = {"engine.micro_batch_size": 2}
    runner = TrialRunner(load_recipe(recipe), 0.1, 60, Console(quiet=True))
    assert (runner(setting), runner(setting)) == (7.0, None)  # a later trial may fail
    with pytest.raises(RecipeError, match="does not run on this machine: DatasetError: nowhere is no dataset"):
        TrialRunner(load_recipe(recipe), 0.1, 60, Console(quiet=True))(setting)


def test_a_trial_that_takes_too_long_is_stopped(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_slow(*_: object, timeout: float, **__: object) -> None:
        raise subprocess.TimeoutExpired("trial", timeout)

    monkeypatch.setattr(subprocess, "run", too_slow)
    runner = TrialRunner(load_recipe(recipe), 0.1, 60, Console(quiet=True))
    assert runner({"engine.micro_batch_size": 2}) is None and runner.failures == ["more than 60 s"]
