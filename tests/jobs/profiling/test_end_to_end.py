"""A profiler that is not permitted is a one-line error; errors of the profiled work stay as they are."""

from pathlib import Path
from typing import Any

import pytest

from maelstream.jobs.profiling import end_to_end
from maelstream.jobs.profiling.end_to_end import write_trace
from maelstream.shards.errors import MaelstreamError


def test_a_profiler_that_is_not_permitted_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_permitted(**options: Any) -> Any:
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES\nand more")

    monkeypatch.setattr(end_to_end, "profile", not_permitted)
    with pytest.raises(MaelstreamError, match=r"^--trace: .*not permitted here \(CUPTI_ERROR_INS.*S\)"):
        write_trace(lambda: None, tmp_path / "t.json", 0)


def test_an_error_of_the_profiled_work_is_not_blamed_on_the_profiler(tmp_path: Path) -> None:
    def work() -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        write_trace(work, tmp_path / "t.json", 0)
