"""The benchmark of profiling overhead runs, and its loops take the same steps."""

import json
from pathlib import Path

from benchmarks.overhead import PLAIN, PROFILED, TRACED, Options, measure
from tests.helpers.forked import CONTEXT


def _measure(recipe: str, out: Path) -> None:
    out.write_text(json.dumps(measure(Options(Path(recipe), rounds=1, seconds=0.05))))


def test_steps_of_all_loops_have_a_cpu_time(tiny: str, tmp_path: Path) -> None:
    process = CONTEXT.Process(target=_measure, args=(tiny, tmp_path / "out.json"))
    process.start()
    process.join()
    seconds_by_loop = json.loads((tmp_path / "out.json").read_text())
    assert seconds_by_loop.keys() == {PLAIN, PROFILED, TRACED}
    assert all(0 < seconds < 10 for seconds in seconds_by_loop.values())
    assert 0.2 < seconds_by_loop[PROFILED] / seconds_by_loop[PLAIN] < 5
