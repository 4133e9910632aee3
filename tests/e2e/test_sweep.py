"""A real sweep of two cells, killed in the second one and started again."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from maelstream.jobs.command import run
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.status import is_locked
from tests.helpers.forked import run_ranks

ROOT = Path(__file__).parents[2]


def test_a_killed_sweep_leaves_no_rank_and_resumes_from_the_checkpoint(
    tiny: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = [tiny, "--dir", str(out), "--grid", "optim.base_lr=0.05,0.1", "--nproc", "1"]
    command = [sys.executable, "-m", "maelstream.jobs.command", "sweep", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first, second = (RunFolder(out / f"base-lr-{lr}_seed-0") for lr in ("0.05", "0.1"))
    run_ranks(1, tiny, "--run", str(first.path), "--seed", "0", "--optim.base-lr", "0.05", output=tmp_path / "first")
    with (tmp_path / "printed").open("w") as printed:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=printed, stderr=printed)
        end = time.monotonic() + 120
        while not second.checkpoints.steps():
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "printed").read_text()
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
    assert not psutil.wait_procs(children, timeout=20)[1] and not is_locked(second.lock)
    killed_at, finished = second.checkpoints.steps()[-1], first.metrics.stat().st_mtime_ns
    assert run("sweep", options) == 0
    assert killed_at < 12 and second.last_step() == 12
    assert "1/2 base_lr=0.05, seed 0: pre-trained" in capfd.readouterr().out
    assert first.metrics.stat().st_mtime_ns == finished
    assert [line["step"] for line in second.read_metrics()] == list(range(1, 13))
    cells = json.loads((out / "results.json").read_text())["cells"]
    assert [cell["optim.base_lr"] for cell in cells] == [0.05, 0.1] and all(cell["loss"] > 0 for cell in cells)
