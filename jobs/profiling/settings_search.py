"""Search for the fastest engine and loader settings of a recipe; `maelstream tune` runs it.

Coordinate descent: the search moves one setting after another as long as that makes training faster, until a round over
all settings gains nothing or the time is up. How a setting is timed is a function that the caller passes.
"""

import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from maelstream.jobs.recipe import Recipe, flat_values, merged_values, named_recipes, nested_values, resolve

MIN_GAIN = 1.01
"""A setting replaces the best one if it is at least this many times as fast; a smaller difference is noise."""
ROUNDS = 3
"""Turns of the final comparison."""

Setting = dict[str, Any]
"""Values by the dotted keys of a recipe."""
MeasureSetting = Callable[[Setting], float | None]
"""Images/s under a setting, or None if training does not run under it."""


class Axis(NamedTuple):
    """A key and the values to try; if they are ordered, the search stops at the first value that does not help."""

    key: str
    values: tuple[Any, ...]
    ordered: bool


@dataclass
class SearchResult:
    """The best setting so far and everything that was measured."""

    best: Setting
    rate: float | None
    """Images/s of the best; None as long as nothing has run."""
    measured: dict[tuple, float | None] = field(default_factory=dict)


def axes_of(recipe: Recipe, cores: int, cuda: bool) -> list[Axis]:
    """The keys and values to try; the recipe's own values are among them.

    Left out are settings that change a run's numbers by more than rounding: precision and dct_scaling.
    """
    engine, loader = recipe.engine, recipe.loader
    powers = {2**power for power in range(16) if 2**power <= recipe.optim.batch_size}
    threads = {0, *(2**power for power in range(10) if 2**power < cores), *(() if cores < 2 else (2 * cores,))}
    axes = [
        Axis("engine.micro_batch_size", _ordered(powers, engine.micro_batch_size), True),
        Axis("engine.activation_checkpointing", (False, True), False),
        *([Axis("engine.compile", (False, True), False)] if engine.zero < 3 else []),
        *(
            [
                Axis("loader.decode.on", ("gpu", "cpu"), False),
                Axis(
                    "loader.decode.hw_decoder_load",
                    _ordered({0.0, 0.5, 0.65, 0.8, 1.0}, loader.decode.hw_decoder_load),
                    True,
                ),
            ]
            if cuda
            else []
        ),
        # 0 means all cores, so it comes just before twice as many
        Axis("loader.threads", tuple(sorted(threads | {loader.threads}, key=lambda number: number or cores)), True),
        Axis("loader.prefetch", _ordered({1, 2, 4, 8, 16}, loader.prefetch), True),
    ]
    return [axis for axis in axes if len(axis.values) > 1]


def _ordered(values: set, own: Any) -> tuple:
    return tuple(sorted(values | {own}))


def search(start: Setting, axes: list[Axis], measure: MeasureSetting, time_is_up: Callable[[], bool]) -> SearchResult:
    """Coordinate descent from `start`, which is always measured, even if the time is up."""
    found = SearchResult(start, None)

    def improves(setting: Setting) -> bool:
        """Measures `setting`; if it is faster than the best, it becomes the best."""
        key = tuple(setting.values())
        if key in found.measured or time_is_up():
            return False
        rate = found.measured[key] = measure(setting)
        if rate is None or (found.rate is not None and rate < found.rate * MIN_GAIN):
            return False
        found.best, found.rate = setting, rate
        return True

    found.rate = found.measured[tuple(start.values())] = measure(start)
    moved = True
    while moved and not time_is_up():
        moved = False
        for axis in axes:
            for direction in _directions(axis, found.best[axis.key]):
                for value in direction:
                    helped = improves(found.best | {axis.key: value})
                    moved |= helped
                    if not helped and found.rate is not None:
                        break
    return found


def _directions(axis: Axis, own: Any) -> Iterable[tuple[Any, ...]]:
    """Values to try one after another: upwards and downwards if they are ordered, else each other value by itself."""
    if not axis.ordered:
        return [(value,) for value in axis.values if value != own]
    index = axis.values.index(own)
    return [axis.values[index + 1 :], axis.values[:index][::-1]]


def compare(
    own: Setting, best: Setting, measure: MeasureSetting, time_is_up: Callable[[], bool]
) -> tuple[list[float], list[float]]:
    """Rates of both settings, measured in turns: at most `ROUNDS` turns, fewer if the time is up."""
    rates: tuple[list[float], list[float]] = ([], [])
    for number in range(2 * ROUNDS):
        if time_is_up():
            break
        rate = measure((own, best)[number % 2])
        if rate is not None:
            rates[number % 2].append(rate)
    return rates


def gain_of(rates: tuple[list[float], list[float]]) -> float | None:
    """Median rate of the best setting over that of the recipe's own; None if one of them was not measured."""
    own, best = rates
    return statistics.median(best) / statistics.median(own) if own and best else None


def setting_of(recipe: Recipe, axes: list[Axis]) -> Setting:
    """The recipe's own values of the axes' keys."""
    values = flat_values(asdict(recipe))
    return {axis.key: values[axis.key] for axis in axes}


def with_setting(recipe: Recipe, setting: Setting) -> Recipe:
    """The recipe with the values of `setting` in place of its own."""
    return resolve(merged_values(asdict(recipe), nested_values(setting)), "a trial")


def override_yaml(base: Path, out: Path, own: Setting, best: Setting) -> str:
    """YAML of a recipe at `out` whose base is the recipe `base` (name or file), with only the values that differ."""
    differing = {key: value for key, value in best.items() if value != own[key]}
    name = str(base) if str(base) in named_recipes() else os.path.relpath(base.resolve(), out.resolve().parent)
    return yaml.safe_dump({"base": name} | nested_values(differing), sort_keys=False)
