"""A trace that cannot be had is one line; other faults stay what they are."""

from pathlib import Path
from typing import Any

import pytest

from maelstream.jobs.profiling import end_to_end as whole
from maelstream.jobs.profiling.end_to_end import write_trace
from maelstream.shards.errors import MaelstreamError


def test_a_profiler_that_is_not_permitted_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**options: Any) -> Any:
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES\nand more")

    monkeypatch.setattr(whole, "profile", refused)
    with pytest.raises(MaelstreamError, match=r"^--trace: .*not permitted here \(CUPTI_ERROR_INS.*S\)"):
        write_trace(lambda: None, tmp_path / "t.json", 0)


def test_a_fault_of_the_work_itself_is_not_taken_for_the_profiler_s(tmp_path: Path) -> None:
    def work() -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        write_trace(work, tmp_path / "t.json", 0)
