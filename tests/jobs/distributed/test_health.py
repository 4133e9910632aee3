"""Skipped steps, loss spikes and ranks without progress are detected, and healthy runs are not reported."""

import errno
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from maelstream.jobs.distributed.health import BadSteps, DivergedError, Spikes, Watchdog
from maelstream.shards.errors import MaelstreamError


def test_only_bad_steps_in_a_row_stop_a_run() -> None:
    bad = BadSteps(3)
    for skipped in (True, True, False, True, True, False):
        bad.note(skipped, 1, "")
    bad.note(True, 8, "runs/a/step-4")
    bad.note(True, 9, "runs/a/step-4")
    with pytest.raises(DivergedError, match=r"3 steps in a row, up to step 10:.*last good checkpoint is runs/a/step-4"):
        bad.note(True, 10, "runs/a/step-4")


def test_a_loss_far_above_the_last_fifty_is_a_spike_and_noise_is_not() -> None:
    spikes = Spikes(2.0)
    assert not spikes.note(100.0)  # the first losses are high
    assert not any(spikes.note(1.0 + 0.5 * (step % 2)) for step in range(60))
    assert spikes.note(3.2)
    assert not spikes.note(1.4)


@pytest.fixture
def watchdogs(tmp_path: Path) -> Callable[..., list[Watchdog]]:
    def make(count: int, printed: list[str]) -> list[Watchdog]:
        return [Watchdog(tmp_path / "ranks", rank, count, 0.5, printed.append) for rank in range(count)]

    return make


def test_the_watchdog_names_the_rank_that_is_behind(watchdogs: Callable[..., list[Watchdog]]) -> None:
    printed: list[str] = []
    first, second, third = watchdogs(3, printed)
    with first, second, third:
        for watchdog in (first, second, third, first, third):
            watchdog.heartbeat()
        end = time.monotonic() + 5
        while len(printed) < 3 and time.monotonic() < end:
            time.sleep(0.02)
    assert len(printed) == 3
    assert all("rank 1: silent for 0.5 s (the others have come further)" in text for text in printed)


def test_no_rank_is_reported_while_one_makes_progress(watchdogs: Callable[..., list[Watchdog]]) -> None:
    """Rank 0 writes a checkpoint for longer than `silent_s` and calls `heartbeat`; rank 1 waits for it."""
    printed: list[str] = []
    first, second = watchdogs(2, printed)
    with first, second:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            first.heartbeat()
            time.sleep(0.02)
    assert printed == []


def test_a_full_disk_ends_no_watchdog_and_its_empty_file_is_read(
    watchdogs: Callable[..., list[Watchdog]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[str] = []
    first, second = watchdogs(2, printed)
    with first, second:
        for file in (tmp_path / "ranks").iterdir():
            file.write_bytes(b"")

        def full(*arguments: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("maelstream.jobs.distributed.health.os.pwrite", full)
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            first.heartbeat()
            second.heartbeat()
            time.sleep(0.02)
        assert first._thread.is_alive() and second._thread.is_alive() and printed == []
        assert first._read() == {0: ("0", "0"), 1: ("0", "0")}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with (
        pytest.raises(MaelstreamError, match=r"run/ranks cannot be made \(Not a directory\); make space or repair it"),
        Watchdog(tmp_path / "run" / "ranks", 0, 1, 0.5),
    ):
        pass
