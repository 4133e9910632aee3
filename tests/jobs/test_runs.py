"""`maelstream runs` and `maelstream watch`: what their files tell of runs, alive and dead."""

import fcntl
import json
from pathlib import Path

import pytest

from maelstream.jobs.command import run
from maelstream.jobs.format import format_ago
from maelstream.jobs.recipe import Recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.status import Status, state_of
from maelstream.jobs.watch import curve


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that says it is running."""
    folder = RunFolder(tmp_path / "runs" / "one")
    folder.start(Recipe(), 0)
    line = {"step": 7, "epoch": 0.5, "loss": 0.25, "lr": 1e-3, "images_per_s": 1234.5, "data_wait": 0.01}
    line |= {"memory_gib": 2.0, "skipped": 1, "spike": False}
    folder.metrics.write_text(json.dumps(line | {"step": 6, "loss": 0.5}) + "\n" + json.dumps(line) + "\n")
    Status("running", 7, 100, 4).write(folder.status)
    return folder


def test_a_run_whose_trainer_is_gone_without_a_word_is_dead(folder: RunFolder) -> None:
    with folder.lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert state_of(folder) == "running"
    assert state_of(folder) == "died"
    Status("failed", 7, 100, 4, "NaN everywhere").write(folder.status)
    assert state_of(folder) == "failed: NaN everywhere"


def test_runs_lists_every_run_below_a_folder(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    RunFolder(folder.path.with_name("two")).start(Recipe(), 0)
    assert run("runs", [str(folder.path.parent)]) == 0
    said = capsys.readouterr().out
    assert "7/100" in said and "0.2500" in said and "not begun" in said


def test_a_folder_without_runs_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("runs", [str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_watch_shows_a_run_from_its_files(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("watch", [str(folder.path)]) == 0
    said = capsys.readouterr().out
    assert "7 of 100" in said and "0.2500, lowest 0.2500, first 0.5000" in said and "1 steps skipped" in said
    assert run("watch", [str(folder.path.parent)]) == 2


def test_curves_and_times_are_short() -> None:
    assert curve([0.0, 1.0, 0.5], 10) == "▁█▅" and len(curve([float(n) for n in range(1000)], 40)) == 40
    assert curve([2.0, 2.0], 10) == "▁▁"
    times = [format_ago(seconds) for seconds in (5, 300, 7200, 200_000)]
    assert times == [
        "5 s ago",
        "5 min ago",
        "2 h ago",
        "2 d ago",
    ]
