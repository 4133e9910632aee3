"""A run resumes after a power loss has damaged what is not a checkpoint, with the steps that it would have taken."""

import shutil
from pathlib import Path

import pytest
import torch

from maelstream.jobs.run_folder.environment import read_starts
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.status import read_status
from tests.helpers.forked import run_ranks


@pytest.fixture(scope="module")
def stopped(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with checkpoints of steps 4 and 7 of 12."""
    folder = tmp_path_factory.mktemp("stopped")
    run_ranks(1, tiny, "--run", str(folder / "run"), "--stop-at-step", "7", output=folder / "output")
    return RunFolder(folder / "run")


@pytest.fixture
def folder(stopped: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy that tests may damage."""
    return RunFolder(shutil.copytree(stopped.path, tmp_path / "run"))


def test_a_run_resumes_with_every_side_file_damaged(stopped: RunFolder, folder: RunFolder, tiny: str) -> None:
    lines = folder.metrics.read_bytes().splitlines(keepends=True)
    folder.metrics.write_bytes(b"".join([*lines[:3], b"\0" * 512, *lines[3:], b"garbage\n"]))
    folder.status.write_bytes(b"")
    folder.environment.write_bytes(b"\0" * 99)
    folder.quarantined.write_bytes(b"\0\n")
    shutil.rmtree(folder.tensorboard)
    folder.tensorboard.write_text("")
    shutil.rmtree(folder.ranks)
    folder.ranks.write_text("")
    folder.lock.unlink()
    folder.lock.mkdir()
    checkpoints = folder.checkpoints.folder
    (checkpoints / "newest").unlink()
    (checkpoints / "newest").mkdir()
    (checkpoints / "step-x.bad").write_text("")
    (checkpoints / "step-00000007.bad").symlink_to("/nowhere")
    (checkpoints / "step-00000012.writing").symlink_to("/nowhere")
    (checkpoints / "step-00000002").write_text("a file in place of a checkpoint")
    printed = run_ranks(1, tiny, "--run", str(folder.path), output=folder.path.with_name("output")).printed
    for name in ("metrics.jsonl", "status.json", "environment.json", "quarantine.jsonl", "tensorboard", "ranks"):
        assert f"it is now {name}.bad" in printed, name
    assert "it is now newest.bad" in printed and "Traceback" not in printed
    assert [line["step"] for line in folder.read_metrics()] == list(range(1, 13))
    status = read_status(folder.status)
    assert status is not None and status.state == "finished" and len(read_starts(folder)) == 1
    assert (folder.checkpoints.folder / "newest").read_text() == "step-00000012\n"


def test_a_damaged_side_file_changes_no_step(stopped: RunFolder, folder: RunFolder, tiny: str, tmp_path: Path) -> None:
    whole = RunFolder(shutil.copytree(stopped.path, tmp_path / "whole"))
    folder.metrics.write_bytes(b"\0" * 99)
    for each in (folder, whole):
        run_ranks(1, tiny, "--run", str(each.path), output=tmp_path / "output")
    ours, theirs = folder.checkpoints.weights(12), whole.checkpoints.weights(12)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [line["step"] for line in folder.read_metrics()] == list(range(8, 13))
