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


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"wandb": 7}'])
def test_a_damaged_file_of_ids_starts_a_new_run_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    stub: Any = ModuleType("wandb")
    ids: list[Any] = []

    def init(**options: Any) -> Any:
        ids.append(options["id"])
        return SimpleNamespace(id="new", finish=lambda: None)

    stub.init = init
    monkeypatch.setitem(sys.modules, "wandb", stub)
    (tmp_path / "trackers.json").write_text(content)
    with trackers(import_trackers(recipe(wandb=True)), recipe(wandb=True), RunFolder(tmp_path)):
        pass
    assert ids == [None] and capsys.readouterr().err.count("trackers.json is damaged: the trackers start new runs") == 1


def test_a_tracker_that_fails_is_reported_once_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub: Any = ModuleType("wandb")
    steps: list[int] = []

    def log(values: dict[str, Any], step: int) -> None:
        steps.append(step)
        if step == 8:
            raise OSError("No space left\non device")

    stub.init, stub.log = lambda **_: SimpleNamespace(id="a", finish=lambda: None), log
    monkeypatch.setitem(sys.modules, "wandb", stub)
    with trackers(import_trackers(recipe(wandb=True)), recipe(wandb=True), RunFolder(tmp_path)) as (track,):
        for step in (7, 8, 9, 10):
            track(step, VALUES)
    assert steps == [7, 8]
    expected = "W&B gets no values from step 8 on (No space left on device); training continues\n"
    assert capsys.readouterr().err == expected
