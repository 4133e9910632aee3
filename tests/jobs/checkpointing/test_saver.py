"""A save that is interrupted anywhere leaves a complete checkpoint or none."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import maelstream.jobs.checkpointing.saver
from maelstream.jobs.checkpointing.saver import SaveError
from maelstream.jobs.checkpointing.store import NEWEST, CheckpointStore
from tests.helpers.saved import control_group, partition, save, save_in_a_process, saver, state


def test_a_save_killed_at_any_file_operation_leaves_only_complete_checkpoints(tmp_path: Path) -> None:
    """Covers every open, sync, rename, mkdir and removal of a save that also deletes the older checkpoint."""
    operation, seen = 0, set()
    while True:
        operation += 1
        folder = tmp_path / str(operation) / "checkpoints"
        save(folder, 1)
        code = save_in_a_process(folder, 2, f"kill_at_file_operation:{operation}")
        store = CheckpointStore(folder)
        assert store.steps() and all(store.fault(step) == "" for step in store.steps())
        seen.add(tuple(store.steps()))
        step, messages = store.newest_good(control_group())
        assert step == store.steps()[-1] and not messages
        if code == 0:
            break
        assert code == -9
        store.sweep()
        assert {path.name for path in folder.iterdir()} - {NEWEST} == {store.at(step).name for step in store.steps()}
    assert operation > 30 and seen == {(1,), (1, 2), (2,)}


def test_a_save_runs_in_the_background_and_holds_the_values_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, may_write = maelstream.jobs.checkpointing.saver.write_tensors, threading.Event()

    def wait_then_write(*args: Any) -> Any:
        assert may_write.wait(10)
        return before(*args)

    monkeypatch.setattr(maelstream.jobs.checkpointing.saver, "write_tensors", wait_then_write)
    writing, training = saver(tmp_path), partition(0)
    expected = partition(0).flats[1][:20].reshape(4, 5).detach().clone()
    writing.save(training, 5, state(5))  # returns before anything is written
    with torch.no_grad():
        training.flats[1].add_(1)  # the next step
    assert writing.is_writing and not writing.has_failed and CheckpointStore(tmp_path).steps() == []
    may_write.set()
    writing.finish()
    assert torch.equal(CheckpointStore(tmp_path).weights(5)["weight"], expected)


def test_a_checkpoint_restores_weights_moments_and_steps(tmp_path: Path) -> None:
    save(tmp_path, 7)
    restored, expected, store = partition(1), partition(7), CheckpointStore(tmp_path)
    store.restore(7, store.state(7, "d"), restored)
    for piece in expected.pieces:
        part = slice(piece.offset, piece.offset + piece.size)
        assert torch.equal(restored.flats[piece.flat][part], expected.flats[piece.flat][part])
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(restored.moment(piece.flat, kind)[part], expected.moment(piece.flat, kind)[part])
    assert restored.steps() == 7


def test_a_failed_save_reports_the_reason_and_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "file")

    monkeypatch.setattr(maelstream.jobs.checkpointing.saver, "write_tensors", full)
    writing = saver(tmp_path)
    writing.save(partition(2), 2, state(2))
    with pytest.raises(
        SaveError, match=r"step-00000002 cannot be written: .*No space left.*older checkpoints are whole"
    ):
        writing.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == [NEWEST, "step-00000001"]
    monkeypatch.undo()
    writing.save(partition(3), 3, state(3))  # the disk has space again
    writing.finish()
    assert CheckpointStore(tmp_path).steps() == [1, 3]


def test_the_newest_and_every_mth_checkpoint_are_kept(tmp_path: Path) -> None:
    for step in range(1, 11):
        save(tmp_path, step, keep=2, keep_every_steps=4)
    assert CheckpointStore(tmp_path).steps() == [4, 8, 9, 10]
    assert (tmp_path / NEWEST).read_text() == "step-00000010\n"
