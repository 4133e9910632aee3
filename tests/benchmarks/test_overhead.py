"""The benchmark of the profile's own cost runs, and compares the same steps."""

import json
from pathlib import Path

from benchmarks.overhead import PLAIN, PROFILED, TRACED, Options, measured
from tests.helpers.forked import CONTEXT


def _measure(recipe: str, out: Path) -> None:
    out.write_text(json.dumps(measured(Options(Path(recipe), rounds=1, seconds=0.05))))


def test_steps_of_both_loops_have_a_cpu_time(tiny: str, tmp_path: Path) -> None:
    process = CONTEXT.Process(target=_measure, args=(tiny, tmp_path / "out.json"))
    process.start()
    process.join()
    found = json.loads((tmp_path / "out.json").read_text())
    assert found.keys() == {PLAIN, PROFILED, TRACED} and all(0 < seconds < 10 for seconds in found.values())
    assert 0.2 < found[PROFILED] / found[PLAIN] < 5
