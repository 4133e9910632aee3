"""Tuning: the search with an injected measure, the comparison, the file written; once for real, on a tiny recipe."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from maelstream.jobs.command import run
from maelstream.jobs.profiling.trial import fits, main
from maelstream.jobs.recipe import EngineConfig, LoaderConfig, OptimConfig, Recipe, RecipeError, load_recipe
from maelstream.jobs.tune import (
    ROUNDS,
    Axis,
    Setting,
    Trials,
    axes_of,
    compare,
    gain_of,
    laid_over,
    override_of,
    search,
    setting_of,
)
from maelstream.shards.dataset import Dataset
from tests.helpers.forked import CONTEXT

AXES = [
    Axis("micro", (8, 16, 32, 64, 128), True),
    Axis("compile", (False, True), False),
    Axis("threads", (1, 2, 4), True),
]
START: Setting = {"micro": 16, "compile": False, "threads": 1}


def never() -> bool:
    return False


def hill(setting: Setting) -> float | None:
    """Best at 64, compiled, 2 threads; 128 does not fit."""
    if setting["micro"] > 64:
        return None
    return setting["micro"] * (2 if setting["compile"] else 1) - 5 * abs(setting["threads"] - 2)


def test_the_search_climbs_to_the_best_of_every_axis() -> None:
    found = search(START, AXES, hill, never)
    assert found.best == {"micro": 64, "compile": True, "threads": 2} and found.rate == 128


def test_nothing_is_measured_twice_and_a_walk_stops_where_it_does_not_help() -> None:
    seen: list[Setting] = []

    def measure(setting: Setting) -> float | None:
        seen.append(setting)
        return 100.0

    found = search(START, AXES, measure, never)
    assert found.best == START
    assert seen == [START] + [
        START | change for change in ({"micro": 32}, {"micro": 8}, {"compile": True}, {"threads": 2})
    ]


def test_a_gain_within_the_noise_moves_nothing() -> None:
    found = search(START, AXES, lambda setting: 100 + 0.005 * setting["micro"], never)
    assert found.best == START


def test_out_of_memory_is_a_result_and_not_an_end() -> None:
    found = search(START | {"micro": 128}, AXES, hill, never)
    assert found.best == {"micro": 64, "compile": True, "threads": 2}
    assert found.measured[(128, False, 1)] is None


def test_a_recipe_that_does_not_fit_is_walked_down_until_something_runs() -> None:
    found = search(START | {"micro": 128}, AXES[:1], lambda setting: 1.0 if setting["micro"] == 8 else None, never)
    assert found.best["micro"] == 8
    assert search(START, AXES, lambda setting: None, never).rate is None


@pytest.mark.parametrize("allowed", [0, 1, 3, 7])
def test_the_budget_is_exceeded_by_no_trial_but_the_first(allowed: int) -> None:
    clock = [0]

    def measure(setting: Setting) -> float | None:
        clock[0] += 1
        return hill(setting)

    search(START, AXES, measure, lambda: clock[0] >= allowed)
    assert clock[0] == max(1, allowed)


def test_both_take_turns_and_medians_count() -> None:
    ours, best = {"micro": 1}, {"micro": 2}
    order: list[Setting] = []
    answers = iter([10.0, 20.0, 1000.0, 21.0, 11.0, 2000.0])

    def measure(setting: Setting) -> float | None:
        order.append(setting)
        return next(answers)

    rates = compare(ours, best, measure, never)
    assert order == [ours, best] * ROUNDS
    assert gain_of(rates) == 21 / 11
    assert gain_of(compare(ours, best, lambda setting: 1.0 if setting == best else None, never)) is None
    assert compare(ours, best, lambda setting: 1.0, lambda: True) == ([], [])


def test_the_file_holds_what_differs_and_leaves_the_experiment_alone(tmp_path: Path) -> None:
    base, out = tmp_path / "recipes" / "base.yaml", tmp_path / "tuned" / "out.yaml"
    for folder in (base.parent, out.parent):
        folder.mkdir()
    base.write_text("model: {dim: 192, heads: 3}\noptim: {batch_size: 64}\nengine: {micro_batch_size: 8}\n")
    recipe = load_recipe(base)
    ours = setting_of(recipe, axes_of(recipe, 4, cuda=True))
    best = ours | {"engine.micro_batch_size": 32, "loader.decode.hw_decoder_load": 0.8}
    out.write_text(override_of(base, out, ours, best))
    values = yaml.safe_load(out.read_text())
    assert values == {
        "base": "../recipes/base.yaml",
        "engine": {"micro_batch_size": 32},
        "loader": {"decode": {"hw_decoder_load": 0.8}},
    }
    tuned = load_recipe(out)
    assert tuned == laid_over(recipe, best) and tuned.model == recipe.model and tuned.optim == recipe.optim


def test_what_changes_a_run_is_never_tried() -> None:
    tried = {axis.key for axis in axes_of(Recipe(), 8, cuda=True)}
    assert all(key.startswith(("engine.", "loader.")) for key in tried)
    assert not tried & {"engine.precision", "loader.decode.dct_scaling", "engine.zero"}
    assert "engine.compile" not in {axis.key for axis in axes_of(Recipe(engine=EngineConfig(zero=3)), 8, cuda=True)}
    assert not {"loader.decode.on", "loader.decode.hw_decoder_load"} & {
        axis.key for axis in axes_of(Recipe(), 8, False)
    }


def test_the_recipes_own_values_are_among_what_is_tried() -> None:
    recipe = Recipe(
        optim=OptimConfig(batch_size=48), engine=EngineConfig(micro_batch_size=12), loader=LoaderConfig(3, 5)
    )
    axes = axes_of(recipe, 2, cuda=False)
    for axis in axes:
        assert setting_of(recipe, axes)[axis.key] in axis.values
        for value in axis.values:
            laid_over(recipe, {axis.key: value})


def test_a_trial_that_cannot_fit_is_known_before_it_runs() -> None:
    assert fits(Recipe(), 24e9)
    assert not fits(Recipe(engine=EngineConfig(micro_batch_size=4096)), 24e9)


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


def test_for_real_on_a_tiny_recipe(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def forked(command: list[str], **_: object) -> subprocess.CompletedProcess:
        """Without the seconds that imports take."""
        assert command[:3] == [sys.executable, "-m", "maelstream.jobs.profiling.trial"]
        process = CONTEXT.Process(target=_trial, args=(*command[3:], tiny.with_name("said")))
        process.start()
        process.join()
        return subprocess.CompletedProcess(command, process.exitcode or 0, tiny.with_name("said").read_text(), "")

    monkeypatch.setattr(subprocess, "run", forked)
    micro_batches = Axis("engine.micro_batch_size", (2, 16), True)
    monkeypatch.setattr("maelstream.jobs.tune.axes_of", lambda *_: [micro_batches])
    monkeypatch.setattr("maelstream.jobs.tune.ROUNDS", 1)
    assert run("tune", [str(tiny), "--minutes", "5", "--trial-seconds", "0.2"]) == 0
    out = tiny.with_name("tiny.tuned.yaml")
    said = " ".join(capsys.readouterr().out.split())
    assert "2 settings tried" in said and f"written to {out}" in said
    values = yaml.safe_load(out.read_text())
    assert values["base"] == "tiny.yaml" and values.keys() <= {"base", "engine"}
    # Eight passes of two images, each with a dozen kernels' start-up, against one of sixteen.
    assert load_recipe(out).engine.micro_batch_size == 16 and "times (medians of" in said


@pytest.mark.parametrize(
    ("code", "stdout", "stderr", "said"),
    [
        (-9, "", "", "out of memory"),
        (1, "", "Traceback\nRuntimeError: DefaultCPUAllocator: can't allocate memory: 9 bytes", "out of memory"),
        (0, 'a line of DeepSpeed\n{"failed": "out of memory"}\n', "", "out of memory"),
        (0, 'a line of DeepSpeed\n{"images_per_s": 7.0}\n', "", "7.00 images/s"),
    ],
)
def test_how_a_trial_ends_is_told(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, code: int, stdout: str, stderr: str, said: str
) -> None:
    done = subprocess.CompletedProcess([], code, stdout, stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    trials = Trials(load_recipe(tiny), 0.1, 60, Console(width=200))
    assert trials({"engine.micro_batch_size": 2}) == (7.0 if "7.0" in stdout else None)
    assert said in capsys.readouterr().out and trials.failures == ([] if "7.0" in stdout else [said])


def test_a_recipe_that_cannot_run_at_all_ends_the_search_at_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [subprocess.CompletedProcess([], 0, '{"images_per_s": 7.0}', "")]
    failed = subprocess.CompletedProcess([], 1, "", "warning\nDatasetError: nowhere is no dataset")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answers.pop() if answers else failed)
    setting = {"engine.micro_batch_size": 2}
    trials = Trials(load_recipe(tiny), 0.1, 60, Console(quiet=True))
    assert (trials(setting), trials(setting)) == (7.0, None)  # a later one may fail
    with pytest.raises(RecipeError, match="does not run here: DatasetError: nowhere is no dataset"):
        Trials(load_recipe(tiny), 0.1, 60, Console(quiet=True))(setting)


def test_a_trial_that_does_not_end_is_ended(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_slow(*_: object, timeout: float, **__: object) -> None:
        raise subprocess.TimeoutExpired("trial", timeout)

    monkeypatch.setattr(subprocess, "run", too_slow)
    trials = Trials(load_recipe(tiny), 0.1, 60, Console(quiet=True))
    assert trials({"engine.micro_batch_size": 2}) is None and trials.failures == ["more than 60 s"]


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
