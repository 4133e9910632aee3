"""The body of `maelstream sweep`: trains and evaluates every cell that is not finished, and collects the results.

A cell is a run of its own below the sweep's folder, started through `maelstream launch`. Each evaluation is a run below
the cell's folder. These folders are the whole state of a sweep, so the same command resumes it.
"""

import functools
import hashlib
import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rich.console import Console

from maelstream.jobs.arguments import parse_arguments
from maelstream.jobs.distributed.launching import SignalForwarder
from maelstream.jobs.evaluation.classify import check_datasets, check_options
from maelstream.jobs.evaluation.options import KnnOptions
from maelstream.jobs.evaluation.results import Evaluation, read_evaluations
from maelstream.jobs.recipe import Job, RecipeError, dump_recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.status import is_locked, read_status
from maelstream.jobs.sweeps.grid import Cell, slug
from maelstream.jobs.sweeps.table import Outcome
from maelstream.shards.dataset import Dataset
from maelstream.shards.durable import atomic_write
from maelstream.shards.errors import MaelstreamError
from maelstream.shards.storage import Storage

_FOLDER_OPTION = {"finetune": "--run", "linprobe": "--run", "partial": "--run", "knn": "--folder"}
"""The option of each job for the folder of its result."""

Start = Callable[[list[str]], int]
"""Runs a command of maelstream until it ends; returns its exit code."""


@dataclass(frozen=True)
class Step:
    """An evaluation of every cell."""

    job: str
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        """The job with its options."""
        return " ".join((self.job, *self.options))

    @property
    def folder(self) -> str:
        """Name of the evaluation's folder below the run that it evaluates."""
        name = slug(self.name.replace("--", ""))
        return name if len(name) <= 80 else f"{name[:80]}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class SweepFolder:
    """Where a sweep writes, and the data of its evaluations."""

    path: Path
    train: str
    """Packed dataset with labels; the recipe's own dataset if empty."""
    val: str
    """Packed dataset for scoring."""

    def run_of(self, cell: Cell) -> RunFolder:
        """The folder of a cell's run."""
        return RunFolder(self.path / cell.folder)

    def train_set(self, cell: Cell) -> str:
        """The dataset that a cell's evaluations train on."""
        return self.train or cell.recipe.data.dataset

    def result_of(self, step: Step, cell: Cell) -> Evaluation | None:
        """The result of a finished evaluation, None if it is not finished; RecipeError if it used other data."""
        folder, train = self.path / cell.folder / step.folder, self.train_set(cell)
        for found in read_evaluations(folder)[:1]:
            # A result holds a folder without the slash at its end, and a URI without its options.
            if any(str(Storage.at(a)) != str(Storage.at(b)) for a, b in ((found.train, train), (found.val, self.val))):
                raise RecipeError(
                    f"{folder} was trained on {found.train} and scored on {found.val}; give these as --train and "
                    "--val, or another --dir"
                )
            return found
        return None


def steps_of(then: Sequence[str]) -> list[Step]:
    """The evaluations that `--then` options name.

    Raises:
        RecipeError: a job that does not evaluate weights, or the same evaluation twice.
    """
    steps = []
    for text in then:
        try:
            job, *options = shlex.split(text) or [""]
        except ValueError as error:
            raise RecipeError(f"--then {text!r} cannot be read: {error}") from None
        if job not in _FOLDER_OPTION:
            raise RecipeError(f"--then {text!r}: give one of {', '.join(_FOLDER_OPTION)}, options in the same quotes")
        if Step(job, tuple(options)) in steps:
            raise RecipeError(f"--then {text!r} comes twice; leave one out")
        steps.append(Step(job, tuple(options)))
    return steps


def seeds_of(text: str, default: int) -> list[int]:
    """The seeds in text such as `0,1,2`, or the default if it is empty; RecipeError for a word that is no number."""
    words = [word.strip() for word in text.split(",")] if text else [str(default)]
    if wrong := [word for word in words if not word.isascii() or not word.isdigit()]:
        raise RecipeError(f"--seeds {text}: {wrong[0]!r} is no seed; write --seeds 0,1,2")
    return [int(word) for word in words]


def is_finished(folder: RunFolder) -> bool:
    """Whether the run has taken every step of its schedule and has a checkpoint."""
    status = read_status(folder.status)
    return status is not None and status.state == "finished" and bool(folder.checkpoints.steps())


def run_cells(folder: SweepFolder, cells: Sequence[Cell], steps: Sequence[Step], start: Start, console: Console) -> int:
    """Trains and evaluates the cells that are not finished; stops at the first exit code that is not 0 and returns it.

    Raises:
        MaelstreamError: before anything starts: a changed recipe, a run that is being trained, a result on other data,
            an evaluation that could not start because of its options, its recipe or its datasets.
    """
    for cell in cells:
        run = folder.run_of(cell)
        run.check_same_experiment(cell.recipe, ())
        if is_locked(run.lock):
            raise RecipeError(f"{run.path} is being trained already; wait for it, stop it, or give another --dir")
    check_steps(folder, cells, steps)
    for number, cell in enumerate(cells, 1):
        run = folder.run_of(cell)
        title = f"{number}/{len(cells)} {cell.row}, seed {cell.seed}"
        if is_finished(run):
            console.print(f"{title}: pre-trained")
        else:
            file = folder.path / "recipes" / f"{cell.folder}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as written:
                written.write(dump_recipe(cell.recipe).encode())
            console.print(f"{title}: pretrain")
            if code := start(["pretrain", str(file), "--run", str(run.path)]):
                return _report_end(code, title, "pretrain", console)
        for step in steps:
            if folder.result_of(step, cell) is not None:
                continue
            console.print(f"{title}: {step.name}")
            options = [*step.options, _FOLDER_OPTION[step.job], str(run.path / step.folder)]
            if step.job != "knn" and "--seed" not in options:
                options += ["--seed", str(cell.seed)]
            if code := start([step.job, str(run.path), folder.train_set(cell), folder.val, *options]):
                return _report_end(code, title, step.name, console)
    return 0


def check_steps(folder: SweepFolder, cells: Sequence[Cell], steps: Sequence[Step]) -> None:
    """Checks the evaluations that are not finished, so that none of them fails after its cell was trained.

    Raises:
        MaelstreamError: wrong options, an unknown recipe, or a dataset that is missing or has no or other labels.
    """
    opened = functools.cache(Dataset.open)
    for step, cell in itertools.product(steps, cells):
        if folder.result_of(step, cell) is not None:
            continue
        train, val = opened(folder.train_set(cell)), opened(folder.val)
        try:
            if step.job == "knn":
                check_datasets(train, val)
                parse_arguments(KnnOptions, [*step.options], step.job).check_count(train)
            else:
                check_options(cast(Job, step.job), step.options, cell.recipe, train, val)
        except MaelstreamError as error:
            raise RecipeError(f'--then "{step.name}": {error}') from None


def outcomes(folder: SweepFolder, cells: Sequence[Cell], steps: Sequence[Step]) -> list[Outcome]:
    """The results that the folders hold now, of finished and unfinished cells."""
    found = []
    for cell in cells:
        run = folder.run_of(cell)
        metrics = [line for line in run.read_metrics() if line.get("loss") is not None]
        results = {step.name: folder.result_of(step, cell) for step in steps}
        loss = metrics[-1]["loss"] if metrics and is_finished(run) else None
        found.append(Outcome(cell, str(run.path), loss, results))
    return found


def _report_end(code: int, title: str, job: str, console: Console) -> int:
    end = "stopped" if code > 128 else f"ended with exit code {code}"
    console.print(f"{title}: {job} {end}; the same command resumes from here")
    return code


def launched(nproc: int, max_restarts: int) -> Start:
    """Starts commands through `maelstream launch`.

    Each gets a session of its own, so that signals reach it only from here. It ends when this process ends, because its
    input ends then.
    """

    def start(arguments: list[str]) -> int:
        launch = ["launch", "--nproc", str(nproc), "--max-restarts", str(max_restarts)]
        command = [sys.executable, "-m", "maelstream.jobs.command", *launch, *arguments]
        with SignalForwarder() as signals:
            process = subprocess.Popen(
                command, env=os.environ | {"MAELSTREAM_STDIN": "1"}, stdin=subprocess.PIPE, start_new_session=True
            )
            signals.forward_to([process])
            code = process.wait()
            return 128 + signals.received if signals.received else 128 - code if code < 0 else code

    return start
