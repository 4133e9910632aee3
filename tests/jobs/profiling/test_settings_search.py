"""The search for fast settings, with an invented function in place of the timing; the recipe that it writes."""

from pathlib import Path

import pytest
import yaml

from maelstream.jobs.profiling.settings_search import (
    ROUNDS,
    Axis,
    Setting,
    axes_of,
    compare,
    gain_of,
    override_yaml,
    search,
    setting_of,
    with_setting,
)
from maelstream.jobs.recipe import EngineConfig, LoaderConfig, OptimConfig, Recipe, load_recipe

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


def test_nothing_is_measured_twice_and_a_direction_ends_at_the_first_value_that_does_not_help() -> None:
    seen: list[Setting] = []

    def measure(setting: Setting) -> float | None:
        seen.append(setting)
        return 100.0

    found = search(START, AXES, measure, never)
    assert found.best == START
    assert seen == [START] + [
        START | change for change in ({"micro": 32}, {"micro": 8}, {"compile": True}, {"threads": 2})
    ]


def test_a_gain_within_the_noise_changes_nothing() -> None:
    found = search(START, AXES, lambda setting: 100 + 0.005 * setting["micro"], never)
    assert found.best == START


def test_the_search_continues_after_out_of_memory() -> None:
    found = search(START | {"micro": 128}, AXES, hill, never)
    assert found.best == {"micro": 64, "compile": True, "threads": 2}
    assert found.measured[(128, False, 1)] is None


def test_a_recipe_that_does_not_fit_gets_smaller_until_it_runs() -> None:
    found = search(START | {"micro": 128}, AXES[:1], lambda setting: 1.0 if setting["micro"] == 8 else None, never)
    assert found.best["micro"] == 8
    assert search(START, AXES, lambda setting: None, never).rate is None


@pytest.mark.parametrize("allowed", [0, 1, 3, 7])
def test_only_the_first_trial_may_exceed_the_budget(allowed: int) -> None:
    clock = [0]

    def measure(setting: Setting) -> float | None:
        clock[0] += 1
        return hill(setting)

    search(START, AXES, measure, lambda: clock[0] >= allowed)
    assert clock[0] == max(1, allowed)


def test_both_settings_take_turns_and_their_medians_are_compared() -> None:
    own, best = {"micro": 1}, {"micro": 2}
    order: list[Setting] = []
    rates_in_turn = iter([10.0, 20.0, 1000.0, 21.0, 11.0, 2000.0])

    def measure(setting: Setting) -> float | None:
        order.append(setting)
        return next(rates_in_turn)

    rates = compare(own, best, measure, never)
    assert order == [own, best] * ROUNDS
    assert gain_of(rates) == 21 / 11
    assert gain_of(compare(own, best, lambda setting: 1.0 if setting == best else None, never)) is None
    assert compare(own, best, lambda setting: 1.0, lambda: True) == ([], [])


def test_the_written_recipe_sets_only_what_differs_and_keeps_the_experiment(tmp_path: Path) -> None:
    base, out = tmp_path / "recipes" / "base.yaml", tmp_path / "tuned" / "out.yaml"
    for folder in (base.parent, out.parent):
        folder.mkdir()
    base.write_text("model: {dim: 192, heads: 3}\noptim: {batch_size: 64}\nengine: {micro_batch_size: 8}\n")
    recipe = load_recipe(base)
    own = setting_of(recipe, axes_of(recipe, 4, cuda=True))
    best = own | {"engine.micro_batch_size": 32, "loader.decode.hw_decoder_load": 0.8}
    out.write_text(override_yaml(base, out, own, best))
    values = yaml.safe_load(out.read_text())
    assert values == {
        "base": "../recipes/base.yaml",
        "engine": {"micro_batch_size": 32},
        "loader": {"decode": {"hw_decoder_load": 0.8}},
    }
    tuned = load_recipe(out)
    assert tuned == with_setting(recipe, best) and tuned.model == recipe.model and tuned.optim == recipe.optim


def test_settings_that_change_the_experiment_are_never_tried() -> None:
    tried = {axis.key for axis in axes_of(Recipe(), 8, cuda=True)}
    assert all(key.startswith(("engine.", "loader.")) for key in tried)
    assert not tried & {"engine.precision", "loader.decode.dct_scaling", "engine.zero"}
    assert "engine.compile" not in {axis.key for axis in axes_of(Recipe(engine=EngineConfig(zero=3)), 8, cuda=True)}
    assert not {"loader.decode.on", "loader.decode.hw_decoder_load"} & {
        axis.key for axis in axes_of(Recipe(), 8, False)
    }


def test_the_recipe_s_own_values_are_among_those_tried() -> None:
    recipe = Recipe(
        optim=OptimConfig(batch_size=48), engine=EngineConfig(micro_batch_size=12), loader=LoaderConfig(3, 5)
    )
    axes = axes_of(recipe, 2, cuda=False)
    for axis in axes:
        assert setting_of(recipe, axes)[axis.key] in axis.values
        for value in axis.values:
            with_setting(recipe, {axis.key: value})
