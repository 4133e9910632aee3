"""`maelstream tune RECIPE`: the fastest engine and loader settings on this machine, found within a time budget.

Coordinate descent: one setting after another is moved as long as that helps, until a round over all of them brings
nothing or the time is up. Each trial is a process of its own (maelstream.jobs.profiling.trial), so running out of memory is a result. Then
the recipe as it is and the best of the search take turns, and the medians say what was gained. What is written is a
recipe laid over the given one, with keys of `engine` and `loader` alone: the experiment stays what it was.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
import yaml
from rich.console import Console
from rich.table import Table

from maelstream.jobs.arguments import parsed
from maelstream.jobs.profiling.trial import OUT_OF_MEMORY
from maelstream.jobs.recipe import Recipe, RecipeError, dump_recipe, load_recipe, resolve
from maelstream.shards.durable import written_whole

MIN_GAIN = 1.01
"""Times as fast as the best that a setting must be to replace it; less is noise."""
ROUNDS = 3
"""Turns of the final comparison."""

Setting = dict[str, Any]
"""Dotted keys of a recipe with their values."""
Measure = Callable[[Setting], float | None]
"""Images/s under a setting, or None where it does not run."""


@dataclass(frozen=True)
class Tune:
    """Find the engine and loader settings that make a recipe fastest on this machine."""

    recipe: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE")]
    minutes: float = 10.0
    """Time to find and compare; one trial at most goes on beyond it."""
    out: Path | None = None
    """The file to write; RECIPE.tuned.yaml beside the recipe, if not given."""
    trial_seconds: float = 5.0
    """How long a trial measures, start-up and warm-up not counted."""


class Axis(NamedTuple):
    """A setting and what it may be; where the values are ordered, a step that does not help ends the walk that way."""

    key: str
    values: tuple[Any, ...]
    ordered: bool


@dataclass
class Search:
    """What was measured, and the best of it."""

    best: Setting
    rate: float | None
    """Images/s of the best; None as long as nothing has run."""
    measured: dict[tuple, float | None] = field(default_factory=dict)


def axes_of(recipe: Recipe, cores: int, cuda: bool) -> list[Axis]:
    """What is worth trying; the recipe's own values are among it.

    What would change the numbers of a run more than rounding does (precision, dct_scaling) is not.
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
        # 0 stands for all cores, the most but twice as many
        Axis("loader.threads", tuple(sorted(threads | {loader.threads}, key=lambda number: number or cores)), True),
        Axis("loader.prefetch", _ordered({1, 2, 4, 8, 16}, loader.prefetch), True),
    ]
    return [axis for axis in axes if len(axis.values) > 1]


def _ordered(values: set, own: Any) -> tuple:
    return tuple(sorted(values | {own}))


def search(start: Setting, axes: list[Axis], measure: Measure, time_is_up: Callable[[], bool]) -> Search:
    """Coordinate descent from `start`, which is measured first, whatever the time."""
    found = Search(start, None)

    def better(setting: Setting) -> bool:
        """Whether `setting` is the new best."""
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
            for walk in _walks(axis, found.best[axis.key]):
                for value in walk:
                    helped = better(found.best | {axis.key: value})
                    moved |= helped
                    if not helped and found.rate is not None:
                        break
    return found


def _walks(axis: Axis, own: Any) -> Iterable[tuple[Any, ...]]:
    """Ways from a value: up and down where the values are ordered, else to each other value alone."""
    if not axis.ordered:
        return [(value,) for value in axis.values if value != own]
    place = axis.values.index(own)
    return [axis.values[place + 1 :], axis.values[:place][::-1]]


def compare(ours: Setting, best: Setting, measure: Measure, time_is_up: Callable[[], bool]) -> tuple[list, list]:
    """Rates of both, which take turns; as many rounds as there is time for, `ROUNDS` at most."""
    rates: tuple[list[float], list[float]] = ([], [])
    for number in range(2 * ROUNDS):
        if time_is_up():
            break
        rate = measure((ours, best)[number % 2])
        if rate is not None:
            rates[number % 2].append(rate)
    return rates


def gain_of(rates: tuple[list[float], list[float]]) -> float | None:
    """Median of the best over the median of the recipe as it is; None where one of them was not measured."""
    ours, best = rates
    return statistics.median(best) / statistics.median(ours) if ours and best else None


def laid_over(recipe: Recipe, setting: Setting) -> Recipe:
    """The recipe with the values of `setting`."""
    values = json.loads(json.dumps(asdict(recipe)))
    for key, value in setting.items():
        *path, name = key.split(".")
        room = values
        for part in path:
            room = room[part]
        room[name] = value
    return resolve(values, "a trial")


def setting_of(recipe: Recipe, axes: list[Axis]) -> Setting:
    """The recipe's own values."""
    values = asdict(recipe)

    def at(key: str) -> Any:
        room: Any = values
        for part in key.split("."):
            room = room[part]
        return room

    return {axis.key: at(axis.key) for axis in axes}


def override_of(base: Path, out: Path, ours: Setting, best: Setting) -> str:
    """YAML of a recipe over `base`, with what differs."""
    values: dict[str, Any] = {"base": os.path.relpath(base.resolve(), out.resolve().parent)}
    for key, value in best.items():
        if value != ours[key]:
            *path, name = key.split(".")
            room = values
            for part in path:
                room = room.setdefault(part, {})
            room[name] = value
    return yaml.safe_dump(values, sort_keys=False)


class Trials:
    """Measures settings of a recipe in processes of their own, and tells of each; longer than `limit_s` is too slow."""

    def __init__(self, recipe: Recipe, seconds: float, limit_s: float, console: Console) -> None:
        self._recipe, self._seconds, self._limit_s, self._console = recipe, seconds, limit_s, console
        self._too_slow, self._ran = f"more than {limit_s:,.0f} s", False
        self.longest_s = 0.0
        self.failures: list[str] = []

    def __call__(self, setting: Setting) -> float | None:
        began = time.monotonic()
        answer = self._answer(setting)
        failure = answer.get("failed", "")
        if failure not in ("", OUT_OF_MEMORY, self._too_slow) and not self._ran:
            raise RecipeError(f"the recipe as it is does not run here: {failure}")
        self._ran = True
        self.longest_s = max(self.longest_s, time.monotonic() - began)
        rate = answer.get("images_per_s")
        if rate is None:
            self.failures.append(answer["failed"])
        said = f"{rate:,.2f} images/s" if rate is not None else answer["failed"]
        self._console.print(f"{said:>24}  {', '.join(f'{key} {value}' for key, value in setting.items())}")
        return rate

    def _answer(self, setting: Setting) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trial.yaml"
            path.write_text(dump_recipe(laid_over(self._recipe, setting)))
            command = [sys.executable, "-m", "maelstream.jobs.profiling.trial", str(path), str(self._seconds)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=self._limit_s)
            except subprocess.TimeoutExpired:
                return {"failed": self._too_slow}
        if done.returncode == -9:
            return {"failed": OUT_OF_MEMORY}
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no word"])[-1]
            if "can't allocate memory" in last or OUT_OF_MEMORY in last:
                return {"failed": OUT_OF_MEMORY}
            return {"failed": last}
        return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


def tune(command: Tune, recipe: Recipe, out: Path, console: Console) -> None:
    """Searches, compares, writes, tells."""
    began, budget_s = time.monotonic(), 60 * command.minutes
    trials = Trials(recipe, command.trial_seconds, max(60.0, budget_s / 4), console)

    def left_s() -> float:
        return budget_s - (time.monotonic() - began)

    axes = axes_of(recipe, len(os.sched_getaffinity(0)), torch.cuda.is_available())
    ours = setting_of(recipe, axes)
    # Half of the time at most is kept for the comparison.
    found = search(ours, axes, trials, lambda: left_s() < min(budget_s / 2, 2 * ROUNDS * trials.longest_s))
    if found.rate is None:
        raise RecipeError(f"{command.recipe}: no trial ran; the last one ended with: {trials.failures[-1]}")
    best = found.best
    rates: tuple[list[float], list[float]] = ([], [])
    if best != ours:
        console.print("the recipe as it is and the best take turns:")
        rates = compare(ours, best, trials, lambda: left_s() <= 0)
    gain = gain_of(rates)
    if gain is not None and gain < MIN_GAIN:
        best = ours
    text = override_of(command.recipe, out, ours, best)
    words = _verdict(ours, best, rates, gain)
    with written_whole(out) as file:
        file.write(f"# maelstream tune {command.recipe.name}: {words}\n{text}".encode())
    table = Table("setting", "recipe", "best", title=f"{command.recipe}, {len(found.measured)} settings tried")
    for key in ours:
        table.add_row(key, str(ours[key]), str(best[key]), style="bold" if ours[key] != best[key] else "")
    console.print(table)
    console.print(f"{words}; written to {out}, which starts as a recipe does")


def _verdict(ours: Setting, best: Setting, rates: tuple[list[float], list[float]], gain: float | None) -> str:
    if best == ours:
        return "nothing tried was faster than the recipe as it is"
    if gain is None:
        return (
            "the recipe as it is does not run here, this does" if not rates[0] and rates[1] else "not compared: no time"
        )
    before, after = map(statistics.median, rates)
    return f"{before:,.2f} -> {after:,.2f} images/s, {gain:.2f} times (medians of {len(rates[1])} turns)"


def main(args: list[str]) -> int:
    """`maelstream tune`."""
    command = parsed(Tune, args, "tune")
    if command.minutes <= 0 or command.trial_seconds <= 0:
        raise RecipeError("--minutes and --trial-seconds are more than 0")
    out = command.out or command.recipe.with_suffix(".tuned.yaml")
    if out.resolve() == command.recipe.resolve():
        raise RecipeError(f"--out {out} is the recipe itself; give another file")
    if not out.resolve().parent.is_dir():
        raise RecipeError(f"--out {out}: there is no folder {out.parent}")
    recipe = load_recipe(command.recipe)
    tune(command, recipe, out, Console(width=max(Console().width, 120)))
    return 0
