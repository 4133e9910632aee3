"""The state of a run, from its status and its lock."""

import fcntl
from pathlib import Path

import pytest

from maelstream.jobs.recipe import Recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.status import Status, is_locked, read_status, state_of


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run without a status."""
    folder = RunFolder(tmp_path / "run")
    folder.start(Recipe(), 0)
    return folder


def test_a_run_without_a_status_has_not_begun(folder: RunFolder) -> None:
    assert read_status(folder.status) is None and state_of(folder) == "not begun"


def test_a_running_run_has_died_if_no_process_holds_its_lock(folder: RunFolder) -> None:
    Status("running", 7, 100, 4).write(folder.status)
    with folder.lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert is_locked(folder.lock) and state_of(folder) == "running"
    assert not is_locked(folder.lock) and state_of(folder) == "died"


def test_the_state_of_an_ended_run_has_its_reason(folder: RunFolder) -> None:
    Status("failed", 7, 100, 4, "NaN everywhere").write(folder.status)
    assert state_of(folder) == "failed: NaN everywhere"
    Status("finished", 100, 100, 4).write(folder.status)
    assert state_of(folder) == "finished"
