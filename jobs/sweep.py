"""`maelstream sweep RECIPE --grid key=a,b,c --dir DIR`: a table of runs, each evaluated, as the paper's Table 1.

A cell is a run of its own below DIR, started through `maelstream launch`, then an evaluation of its own for each
`--then`. What is finished is not done again, and what was stopped goes on from its checkpoint: the same command again.
"""

import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from maelstream.jobs.arguments import parsed
from maelstream.jobs.evaluation.results import Evaluation, read_evaluations
from maelstream.jobs.launch import Signals, gpus
from maelstream.jobs.recipe import RecipeError, dump_recipe, load_recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.status import is_locked, read_status
from maelstream.jobs.sweeps.grid import Cell, cells_of, grid_of, slug
from maelstream.jobs.sweeps.table import Outcome, draw, table, write_results
from maelstream.shards.durable import written_whole
from maelstream.shards.errors import MaelstreamError

_FOLDER = {"finetune": "--run", "linprobe": "--run", "partial": "--run", "knn": "--folder"}
"""Each job's option for the folder of its result."""

Start = Callable[[list[str]], int]
"""Runs a command of maelstream to its end; its exit code."""


@dataclass(frozen=True)
class Sweep:
    """Run a table: every combination of the grids' values and the seeds, each a run, then its evaluations."""

    recipe: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE")]
    """What every cell is laid over."""
    dir: Path
    """The folder of the runs. A sweep that lies there already goes on."""
    grid: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=A,B,C|NAME")] = ()
    """Values of a key, a file, or one of recipes/grids (decoder_depth, mask_ratio, ...); several multiply."""
    seeds: str = ""
    """Such as 0,1,2; the recipe's own if not given."""
    then: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="JOB")] = ()
    """finetune, linprobe, partial or knn, with its options in the same quotes: --then "partial --blocks 4"."""
    train: str = ""
    """Packed dataset with labels for the evaluations; the recipe's own if not given."""
    val: str = ""
    """Packed dataset to measure on."""
    nproc: int | None = None
    """Ranks of each run; one a GPU, or one, if not given."""
    max_restarts: int = 0
    """How often each is started again after a failure."""


@dataclass(frozen=True)
class Step:
    """An evaluation that every cell gets."""

    job: str
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        return " ".join((self.job, *self.options))

    @property
    def folder(self) -> str:
        """Name of its own run's folder, below the run whose weights it takes."""
        name = slug(self.name.replace("--", ""))
        return name if len(name) <= 80 else f"{name[:80]}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"


def steps_of(then: Sequence[str]) -> list[Step]:
    """RecipeError for what is no evaluation of weights, or one that comes twice."""
    steps = []
    for text in then:
        job, *options = shlex.split(text) or [""]
        if job not in _FOLDER:
            raise RecipeError(f"--then {text!r}: {', '.join(_FOLDER)}, with options in the same quotes")
        if Step(job, tuple(options)) in steps:
            raise RecipeError(f"--then {text!r} comes twice; leave one out")
        steps.append(Step(job, tuple(options)))
    return steps


def seeds_of(text: str, own: int) -> list[int]:
    """RecipeError for what is no number."""
    words = [word.strip() for word in text.split(",")] if text else [str(own)]
    if wrong := [word for word in words if not word.isascii() or not word.isdigit()]:
        raise RecipeError(f"--seeds {text}: {wrong[0]!r} is no seed; write --seeds 0,1,2")
    return [int(word) for word in words]


def is_finished(folder: RunFolder) -> bool:
    """Whether the run has taken every step of its schedule, and its weights lie there."""
    status = read_status(folder.status)
    return status is not None and status.state == "finished" and bool(folder.checkpoints.steps())


def result_of(step: Step, run: Path, train: str, val: str) -> Evaluation | None:
    """What a finished evaluation of a run found; RecipeError when it was made on other data."""
    folder = run / step.folder
    for found in read_evaluations(folder)[:1]:
        if (found.train, found.val) != (train, val):
            raise RecipeError(
                f"{folder} was made with {found.train} and measured on {found.val}; give these --train and --val, or "
                "another --dir"
            )
        return found
    return None


def sweep(command: Sweep, cells: Sequence[Cell], steps: Sequence[Step], start: Start, console: Console) -> int:
    """Does what is not done; the first exit code that is not 0. `start` runs a command to its end."""
    train, val = command.train or cells[0].recipe.data.dataset, command.val
    for cell in cells:
        folder = RunFolder(command.dir / cell.folder)
        folder.check_same_experiment(cell.recipe, ())
        if is_locked(folder.lock):
            raise RecipeError(f"{folder.path} is being trained already; wait for it, stop it, or give another --dir")
        for step in steps:
            result_of(step, folder.path, train, val)
    for number, cell in enumerate(cells, 1):
        run = command.dir / cell.folder
        shown = f"{number}/{len(cells)} {cell.row}, seed {cell.seed}"
        if is_finished(RunFolder(run)):
            console.print(f"{shown}: pre-trained")
        else:
            file = command.dir / "recipes" / f"{cell.folder}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(file) as written:
                written.write(dump_recipe(cell.recipe).encode())
            console.print(f"{shown}: pretrain")
            if code := start(["pretrain", str(file), "--run", str(run)]):
                return _told(code, shown, "pretrain", console)
        for step in steps:
            if result_of(step, run, train, val) is not None:
                continue
            console.print(f"{shown}: {step.name}")
            options = [*step.options, _FOLDER[step.job], str(run / step.folder)]
            if step.job != "knn" and "--seed" not in options:
                options += ["--seed", str(cell.seed)]
            if code := start([step.job, str(run), train, val, *options]):
                return _told(code, shown, step.name, console)
    return 0


def outcomes(command: Sweep, cells: Sequence[Cell], steps: Sequence[Step]) -> list[Outcome]:
    """What the folders tell now, finished or not."""
    found = []
    for cell in cells:
        folder = RunFolder(command.dir / cell.folder)
        metrics = [line for line in folder.read_metrics() if line.get("loss") is not None]
        train = command.train or cell.recipe.data.dataset
        results = {step.name: result_of(step, folder.path, train, command.val) for step in steps}
        loss = metrics[-1]["loss"] if metrics and is_finished(folder) else None
        found.append(Outcome(cell, str(folder.path), loss, results))
    return found


def _told(code: int, shown: str, what: str, console: Console) -> int:
    how = "stopped" if code > 128 else f"ended with exit code {code}"
    console.print(f"{shown}: {what} {how}; the same command goes on from here")
    return code


def launched(nproc: int, max_restarts: int) -> Start:
    """Commands through `maelstream launch`, in a session of their own: signals come through us; our end is theirs."""

    def start(arguments: list[str]) -> int:
        launch = ["launch", "--nproc", str(nproc), "--max-restarts", str(max_restarts)]
        command = [sys.executable, "-m", "maelstream.jobs.command", *launch, *arguments]
        with Signals() as signals:
            process = subprocess.Popen(
                command, env=os.environ | {"MAELSTREAM_STDIN": "1"}, stdin=subprocess.PIPE, start_new_session=True
            )
            signals.to([process])
            code = process.wait()
            return 128 + signals.received if signals.received else 128 - code if code < 0 else code

    return start


def main(args: list[str]) -> int:
    """`maelstream sweep`; 0 when every cell is done, else the exit code of what was not."""
    command = parsed(Sweep, args, "sweep")
    recipe, grids = load_recipe(command.recipe), [grid_of(text) for text in command.grid]
    steps = steps_of([*command.then, *(text for grid in grids for text in grid.then)])
    cells = cells_of(recipe, grids, seeds_of(command.seeds, recipe.seed))
    if not grids and not command.seeds:
        raise RecipeError("a sweep has a --grid key=a,b,c, or --seeds 0,1,2; `maelstream pretrain` runs one recipe")
    if steps and not command.val:
        raise RecipeError(f"--then {steps[0].name} needs --val: a packed dataset to measure on")
    if (command.nproc is not None and command.nproc < 1) or command.max_restarts < 0:
        raise RecipeError("--nproc starts at 1 and --max-restarts at 0")
    console = Console(width=max(Console().width, 120))
    start = launched(command.nproc or max(1, gpus()), command.max_restarts)
    code = sweep(command, cells, steps, start, console)
    found = outcomes(command, cells, steps)
    title = "; ".join(grid.title for grid in grids) or str(command.recipe)
    names = [step.name for step in steps]
    try:
        command.dir.mkdir(parents=True, exist_ok=True)
        write_results(found, names, command.dir)
    except OSError as error:
        raise MaelstreamError(f"{command.dir} cannot be written ({error.strerror})") from None
    console.print(table(found, names, title))
    written = ["results.json", "results.csv"]
    if any(result is not None for outcome in found for result in outcome.results.values()):
        draw(found, names, title, command.dir / "sweep.png")
        written.append("sweep.png")
    console.print(f"{command.dir}: {', '.join(written)}")
    return code
