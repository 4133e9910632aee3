"""Training starts in a folder that holds a user's own model.py, jobs.py, pipeline.py and shards.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.forked import free_port

MAELSTREAM = [sys.executable, "-m", "maelstream.jobs.command"]
PRETRAIN = ["maelstream.jobs.pretrain"]
STEPS = ["--run", "run", "--stop-at-step", "1"]


def starters(tiny: str) -> dict[str, list[str]]:
    deepspeed = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--master_port",
        str(free_port()),
        "--num_gpus",
        "1",
    ]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "1",
        "--module",
        "--",
    ]
    return {
        "pretrain": [*MAELSTREAM, "pretrain", tiny, *STEPS],
        "launch": [*MAELSTREAM, "launch", "--nproc", "1", "pretrain", tiny, *STEPS],
        "tune": [*MAELSTREAM, "tune", tiny, "--minutes", "0.05", "--trial-seconds", "0.2", "--out", "tuned.yaml"],
        "sweep": [*MAELSTREAM, "sweep", tiny, "--grid", "optim.base_lr=0.05", "--dir", "sweep", "--nproc", "1"],
        "deepspeed": [*deepspeed, "--module", *PRETRAIN, tiny, *STEPS],
        "torchrun": [*torchrun, *PRETRAIN, tiny, *STEPS],
    }


@pytest.mark.parametrize("starter", ["pretrain", "launch", "tune", "sweep", "deepspeed", "torchrun"])
def test_training_starts_next_to_a_user_s_files_of_the_same_names(starter: str, tiny: str, tmp_path: Path) -> None:
    for name in ("model", "jobs", "pipeline", "shards", "recipes"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('the user\\'s {name}.py was imported')\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        starters(tiny)[starter], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "was imported" not in done.stdout + done.stderr
    if starter != "tune":
        assert list(tmp_path.rglob("step-0*")), "no checkpoint was written"
