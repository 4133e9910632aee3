"""A run resumes after a power loss has damaged what is not a checkpoint, with the steps that it would have taken."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from maelstream.jobs.checkpointing.digest import digest_of
from maelstream.jobs.checkpointing.store import MANIFEST, STATE, WEIGHTS
from maelstream.jobs.run_folder.environment import read_starts
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.status import read_status
from tests.helpers.forked import run_ranks, start


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


def sign(checkpoint: Path) -> None:
    """Writes a manifest that fits the files as they are now."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"] = {name: asdict(digest_of(checkpoint / name)) for name in manifest["files"]}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def edit_tensors(pattern: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(checkpoint: Path) -> None:
        (path,) = checkpoint.glob(pattern)
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def edit_state(**values: object) -> Callable[[Path], None]:
    def edit(checkpoint: Path) -> None:
        state = json.loads((checkpoint / STATE).read_text())
        (checkpoint / STATE).write_text(json.dumps(state | values))

    return edit


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / name).write_text(content)


MOMENT = "exp_avg/cls_token@0"
MISFITS: dict[str, Callable[[Path], Any]] = {
    "no state": text(STATE, ""),
    "a list as state": text(STATE, "[]"),
    "nested state": text(STATE, "[" * 100_000),
    "a state without a position": edit_state(loader={"epoch": 0}),
    "a position beyond the dataset": edit_state(loader={"epoch": 0, "position": 10**9}),
    "a negative epoch": edit_state(loader={"epoch": -1, "position": 0}),
    "a number of steps as text": edit_state(optimizer_steps="7"),
    "a dataset that is no text": edit_state(dataset=None),
    "weights that are no tensors": text(WEIGHTS, "x" * 100),
    "another shape": edit_tensors(WEIGHTS, lambda t: t.update({"norm.weight": torch.ones(7)})),
    "a missing tensor": edit_tensors(WEIGHTS, lambda t: t.pop("norm.weight")),
    "another dtype": edit_tensors(WEIGHTS, lambda t: t.update({"norm.weight": torch.ones(48, dtype=torch.int32)})),
    "a missing moment": edit_tensors("moments-*", lambda t: t.pop(MOMENT)),
    "a short moment": edit_tensors("moments-*", lambda t: t.update({MOMENT: t[MOMENT][:-1].clone()})),
    "a moment with another name": edit_tensors("moments-*", lambda t: t.update({"odd": t.pop(MOMENT)})),
    "moments that are no tensors": lambda c: next(c.glob("moments-*")).write_text("x" * 100),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_put_aside_and_the_older_one_is_used(
    folder: RunFolder, tiny: str, name: str
) -> None:
    """Its manifest is valid, so every byte is as the manifest says."""
    newest = folder.checkpoints.at(7)
    MISFITS[name](newest)
    sign(newest)
    assert folder.checkpoints.fault(7) == ""
    output = folder.path.with_name("output")
    printed = run_ranks(1, tiny, "--run", str(folder.path), "--stop-at-step", "8", output=output).printed
    assert f"{newest}: " in printed and "resuming from step-00000004" in printed and "Traceback" not in printed
    assert folder.checkpoints.steps() == [4, 8]
    assert [line["step"] for line in folder.read_metrics()] == list(range(1, 9))


def test_if_no_checkpoint_fits_the_run_ends_with_one_line_and_keeps_them(folder: RunFolder, tiny: str) -> None:
    for step in (4, 7):
        MISFITS["another shape"](folder.checkpoints.at(step))
        sign(folder.checkpoints.at(step))
    started = start(1, tiny, "--run", str(folder.path), output=folder.path.with_name("output"))
    assert started.wait() == [2] and folder.checkpoints.steps() == [4, 7]
    assert "no older checkpoint fits: restore one" in started.printed and "Traceback" not in started.printed
