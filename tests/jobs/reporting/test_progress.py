"""The progress of packing shows the rate of the step, and notes go to stderr."""

import re

import pytest

from maelstream.jobs.reporting.progress import PackProgress
from maelstream.shards.pack import Notice, Progress


def test_a_step_that_follows_a_scan_is_timed_from_the_end_of_the_scan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Timed from its own first report, the first shard of an hour of scanning shows 131,371,519 images/s."""
    clock = iter([0.0, 0.0, 10.0, 12.0, 14.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    display = PackProgress()
    monkeypatch.setattr(display._bar, "start", lambda: None)
    monkeypatch.setattr(display._bar, "stop", lambda: None)
    with display:
        display(Progress("scan", 1, 1, "a.tar", 1000, 0, 10, 10))
        display(Progress("shard", 1, 2, "x-0.tar", 500, 0, 5, 10))
        display(Progress("shard", 2, 2, "x-1.tar", 500, 0, 5, 10))
    rates = re.findall(r"([\d,]+) images/s", capsys.readouterr().out)
    assert rates == ["100", "250", "250"]


def test_a_note_is_a_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    PackProgress()(Notice("2 samples hold several images"))
    printed = capsys.readouterr()
    assert printed.err == "note: 2 samples hold several images\n" and not printed.out
