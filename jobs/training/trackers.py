"""Weights & Biases and MLflow: they receive the numbers of metrics.jsonl if the recipe enables them.

Both are optional packages, imported only then. A resumed run continues there too: `trackers.json` holds its ids.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter

from maelstream.jobs.recipe import AnyRecipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.shards.durable import atomic_write
from maelstream.shards.errors import MaelstreamError

Tracker = Callable[[int, dict[str, Any]], None]


def import_trackers(recipe: AnyRecipe) -> dict[str, ModuleType]:
    """Imports the trackers that the recipe enables; MaelstreamError if one is not installed."""
    modules = {}
    for name, wanted in (("wandb", recipe.log.wandb), ("mlflow", recipe.log.mlflow)):
        if wanted:
            try:
                modules[name] = __import__(name)
            except ImportError as error:
                raise MaelstreamError(
                    f"log.{name} is set, but {error}: `pip install maelstream[{name}]`, or --log.no-{name}"
                ) from None
    return modules


@contextmanager
def trackers(modules: dict[str, ModuleType], recipe: AnyRecipe, folder: RunFolder) -> Iterator[list[Tracker]]:
    """Yields functions that record the values of a step, for rank 0.

    A tracker that fails while the run trains is reported once and then left out: a run does not end because a server or
    a disk does not take its curves.
    """
    file = folder.path / "trackers.json"
    known = _known_ids(file)
    name = folder.path.resolve().name
    found: list[Tracker] = []
    with ExitStack() as stack:
        if wandb := modules.get("wandb"):
            run = wandb.init(
                project="maelstream",
                name=name,
                id=known.get("wandb"),
                resume="allow",
                dir=str(folder.path),
                config=asdict(recipe),
            )
            known["wandb"] = run.id
            stack.callback(run.finish)
            found.append(_Kept("W&B", lambda step, values: wandb.log(values, step=step)))
        if mlflow := modules.get("mlflow"):
            mlflow.set_experiment("maelstream")
            # MLflow accepts a name only for a new run.
            which = {"run_id": known["mlflow"]} if "mlflow" in known else {"run_name": name}
            run = stack.enter_context(mlflow.start_run(**which))
            known["mlflow"] = run.info.run_id
            found.append(_Kept("MLflow", lambda step, values: mlflow.log_metrics(_numbers(values), step=step)))
        if modules:
            _write_ids(file, known)
        yield found


class _Kept:
    """A tracker until its first failure, which it reports."""

    def __init__(self, name: str, tracker: Tracker):
        self._name, self._tracker = name, tracker

    def __call__(self, step: int, values: dict[str, Any]) -> None:
        try:
            self._tracker(step, values)
        except Exception as error:
            self._tracker = lambda step, values: None
            reason = " ".join(str(error).split())[:300]
            print(f"{self._name} gets no values from step {step} on ({reason}); training continues", file=sys.stderr)


def _known_ids(file: Path) -> dict[str, str]:
    """The ids of the run at each tracker; none if the file is missing or damaged, which is reported."""
    if not file.is_file():
        return {}
    try:
        return TypeAdapter(dict[str, str]).validate_json(file.read_bytes())
    except ValueError:
        print(f"{file} is damaged: the trackers start new runs", file=sys.stderr)
        return {}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None}


def _write_ids(file: Path, known: dict[str, str]) -> None:
    with atomic_write(file) as out:
        out.write(json.dumps(known).encode())
