"""`maelstream tune RECIPE`: finds the fastest engine and loader settings on this machine within a time budget.

After the search (jobs/profiling/settings_search.py), the recipe's own settings and the best ones are measured in turns,
and the medians give the gain. The result is a recipe based on the given one that sets only keys of `engine` and
`loader`, so the experiment stays the same.
"""

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from maelstream.jobs.arguments import check_output_file, parse_arguments
from maelstream.jobs.profiling.settings_search import (
    MIN_GAIN,
    ROUNDS,
    Setting,
    axes_of,
    compare,
    gain_of,
    override_yaml,
    search,
    setting_of,
)
from maelstream.jobs.profiling.trial_runner import TrialRunner
from maelstream.jobs.recipe import Recipe, RecipeError, load_recipe
from maelstream.shards.durable import atomic_write


@dataclass(frozen=True)
class Tune:
    """Find the engine and loader settings that make a recipe fastest on this machine."""

    recipe: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE")]
    """The name or the YAML file of a pre-training recipe."""
    minutes: float = 10.0
    """Minutes to search and compare; at most one trial runs longer."""
    out: Path | None = None
    """The recipe to write; RECIPE.tuned.yaml in the recipe's folder if not given."""
    trial_seconds: float = 5.0
    """Seconds that a trial measures, after its start and warm-up."""


def tune(command: Tune, recipe: Recipe, out: Path, console: Console) -> None:
    """Searches, compares, writes the tuned recipe and prints the result."""
    import torch  # takes seconds; the options are checked before

    began, budget_s = time.monotonic(), 60 * command.minutes
    runner = TrialRunner(recipe, command.trial_seconds, max(60.0, budget_s / 4), console)

    def left_s() -> float:
        return budget_s - (time.monotonic() - began)

    axes = axes_of(recipe, len(os.sched_getaffinity(0)), torch.cuda.is_available())
    own = setting_of(recipe, axes)
    # At most half of the time is reserved for the comparison.
    found = search(own, axes, runner, lambda: left_s() < min(budget_s / 2, 2 * ROUNDS * runner.longest_s))
    if found.rate is None:
        raise RecipeError(f"{command.recipe}: every trial failed, the last one with: {runner.failures[-1]}")
    best = found.best
    rates: tuple[list[float], list[float]] = ([], [])
    if best != own:
        console.print("comparing the recipe's own settings with the best ones, in turns:")
        rates = compare(own, best, runner, lambda: left_s() <= 0)
    gain = gain_of(rates)
    if gain is not None and gain < MIN_GAIN:
        best = own
    text = override_yaml(command.recipe, out, own, best)
    result = _result(own, best, rates, gain)
    with atomic_write(out) as file:
        file.write(f"# maelstream tune {command.recipe.name}: {result}\n{text}".encode())
    table = Table("setting", "recipe", "best", title=f"{command.recipe}, {len(found.measured)} settings tried")
    for key in own:
        table.add_row(key, str(own[key]), str(best[key]), style="bold" if own[key] != best[key] else "")
    console.print(table)
    console.print(f"{result}; written to {out}, a recipe like any other")


def _result(own: Setting, best: Setting, rates: tuple[list[float], list[float]], gain: float | None) -> str:
    if best == own:
        return "no setting was faster than the recipe's own"
    if gain is None:
        return (
            "the recipe's own settings do not run here, these do"
            if not rates[0] and rates[1]
            else "not compared: no time"
        )
    before, after = map(statistics.median, rates)
    return f"{before:,.2f} -> {after:,.2f} images/s, {gain:.2f} times as fast (medians of {len(rates[1])} turns)"


def main(args: list[str]) -> int:
    """`maelstream tune`."""
    command = parse_arguments(Tune, args, "tune")
    if command.minutes <= 0 or command.trial_seconds <= 0:
        raise RecipeError("--minutes and --trial-seconds must be more than 0")
    out = command.out or command.recipe.with_suffix(".tuned.yaml")
    if out.resolve() == command.recipe.resolve():
        raise RecipeError(f"--out {out} is the recipe itself; give another file")
    check_output_file("--out", out)
    recipe = load_recipe(command.recipe)
    tune(command, recipe, out, Console(width=max(Console().width, 120), markup=False, emoji=False))
    return 0
