"""W&B and MLflow are imported only when enabled, receive the same numbers, and continue their own runs."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from maelstream.jobs.recipe import Recipe, resolve
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.training.trackers import import_trackers, trackers
from maelstream.shards.errors import MaelstreamError

VALUES = {"loss": None, "lr": 0.5, "spike": True}


def recipe(**log: bool) -> Recipe:
    return resolve({"log": log}, "here")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_gets_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert import_trackers(recipe()) == {}
    with pytest.raises(MaelstreamError, match=rf"log\.{name} is set.*pip install maelstream\[{name}\]"):
        import_trackers(recipe(**{name: True}))


def test_wandb_receives_every_value_and_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    stub: Any = ModuleType("wandb")
    run = SimpleNamespace(id="abc", finish=lambda: calls.append("finish"))

    def init(**options: Any) -> Any:
        calls.append((options["id"], options["resume"], options["name"]))
        return run

    stub.init = init
    stub.log = lambda values, step: calls.append((step, values))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    enabled = recipe(wandb=True)
    for _ in range(2):
        with trackers(import_trackers(enabled), enabled, RunFolder(tmp_path)) as (track,):
            track(7, VALUES)
    name = tmp_path.name
    assert calls == [(None, "allow", name), (7, VALUES), "finish", ("abc", "allow", name), (7, VALUES), "finish"]


def test_mlflow_receives_the_numbers_and_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        info = SimpleNamespace(run_id="r1")

        def __enter__(self) -> "Run":
            return self

        def __exit__(self, *exception: object) -> None:
            calls.append("end")

    def start_run(**which: str) -> Run:
        calls.append(which)
        return Run()

    stub: Any = ModuleType("mlflow")
    stub.set_experiment = lambda name: None
    stub.start_run = start_run
    stub.log_metrics = lambda values, step: calls.append((step, values))
    monkeypatch.setitem(sys.modules, "mlflow", stub)
    enabled = recipe(mlflow=True)
    for _ in range(2):
        with trackers(import_trackers(enabled), enabled, RunFolder(tmp_path)) as (track,):
            track(7, VALUES)
    logged = (7, {"lr": 0.5, "spike": 1.0})  # MLflow accepts no null
    assert calls == [{"run_name": tmp_path.name}, logged, "end", {"run_id": "r1"}, logged, "end"]
