"""A full disk under the run folder does not end training: metrics, TensorBoard and status.json are by-products."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from maelstream.jobs.training import log
from maelstream.jobs.training.log import Metrics


def full(*args: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_metrics_that_a_full_disk_refuses_are_written_when_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.add("1\n")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        metrics.add("2\n")
        metrics.add("3\n")
    metrics.add("4\n")
    assert (tmp_path / "metrics.jsonl").read_text() == "1\n2\n3\n4\n"
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "metrics.jsonl cannot be written (No space left on device)" in printed


@pytest.mark.parametrize("where", ["open", "add", "close", "thread"])
def test_tensorboard_on_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    class Writer:
        def __init__(self, *args: Any, **options: Any):
            if where == "open":
                full()

        def add_scalar(self, *args: Any) -> None:
            if where == "add":
                full()
            if where == "thread":
                thread = threading.Thread(target=full)
                thread.start()
                thread.join()

        def close(self) -> None:
            if where == "close":
                full()

    monkeypatch.setattr(log, "SummaryWriter", Writer)
    with log._curves(tmp_path, 0) as add:
        add(1, {"loss": 1.0})
        add(2, {"loss": 1.0})
    printed = capsys.readouterr().err
    assert (
        printed
        == f"maelstream: {tmp_path} cannot be written (No space left on device); training continues without it\n"
    )
