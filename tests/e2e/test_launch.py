"""Launchers on the command line: exit codes, restarts, two nodes, SLURM's environment, and no orphans."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from maelstream.jobs.run_folder.folder import RunFolder
from tests.helpers.forked import free_port, run_ranks

ROOT = Path(__file__).parents[2]
LONG = ("--optim.epochs", "4000", "--checkpoint.every-steps", "20")
Begin = Callable[..., subprocess.Popen]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Starts a command; at the end of the test it is killed if it still runs."""
    started = []

    def start(*command: str, **more: str) -> subprocess.Popen:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | more
        output = (tmp_path / "output").open("a")
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def launch(*options: str) -> list[str]:
    return [sys.executable, "-m", "maelstream.jobs.command", "launch", *options, "pretrain"]


def deepspeed(ranks: int) -> list[str]:
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]
    return [*runner, "--num_gpus", str(ranks), "--module", "maelstream.jobs.pretrain"]


def wait_for_step(folder: RunFolder, step: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not any(line["step"] >= step for line in folder.read_metrics()):
        printed = folder.path.with_name("output").read_text()
        assert time.monotonic() < end and process.poll() is None, printed
        time.sleep(0.1)


def ranks_of(folder: RunFolder) -> list[psutil.Process]:
    """Processes that train this run, by rank."""
    found = {}
    for process in psutil.process_iter(["cmdline", "environ"]):
        line, environment = process.info["cmdline"] or [], process.info["environ"] or {}
        if str(folder.path) in line and "launch" not in line and "RANK" in environment and "deepspeed" not in str(line):
            found[int(environment["RANK"])] = process
    return [found[rank] for rank in sorted(found)]


def assert_gone(processes: list[psutil.Process]) -> None:
    """Asserts that these processes end within 10 s."""
    assert processes
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


def test_a_killed_rank_restarts_and_is_left_out_after_its_second_failure(
    tiny: str, tmp_path: Path, begin: Begin
) -> None:
    """At the end the launcher receives SIGTERM: its rank saves, and the launcher returns the rank's exit code."""
    folder = RunFolder(tmp_path / "run")
    launcher = begin(*launch("--nproc", "2", "--max-restarts", "2"), tiny, "--run", str(folder.path), *LONG)
    for step in (25, 60):
        wait_for_step(folder, step, launcher)
        ranks_of(folder)[1].kill()
        time.sleep(2)
    wait_for_step(folder, folder.checkpoints.steps()[-1] + 30, launcher)
    assert len(ranks_of(folder)) == 1
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(30) == 128 + signal.SIGTERM
    assert folder.checkpoints.steps()[-1] == folder.read_metrics()[-1]["step"]
    steps = [line["step"] for line in folder.read_metrics()]
    assert steps == list(range(1, len(steps) + 1))  # each step once
    printed = (tmp_path / "output").read_text()
    assert "rank 1 ended with exit code 137" in printed and "device 1 failed first twice in a row" in printed


@pytest.mark.parametrize("starter", ["maelstream", "deepspeed"])
def test_no_rank_is_left_after_the_launcher_is_killed(tiny: str, tmp_path: Path, begin: Begin, starter: str) -> None:
    folder = RunFolder(tmp_path / "run")
    command = launch("--nproc", "2") if starter == "maelstream" else deepspeed(2)
    launcher = begin(*command, tiny, "--run", str(folder.path), *LONG)
    wait_for_step(folder, 3, launcher)
    ranks = ranks_of(folder)
    assert len(ranks) == 2
    launcher.kill()
    assert_gone(ranks)


def test_two_launchers_train_one_run(tiny: str, tmp_path: Path, begin: Begin) -> None:
    options = ("--nproc", "1", "--nnodes", "2", "--master", f"127.0.0.1:{free_port()}")
    nodes = [begin(*launch(*options, "--node-rank", node), tiny, "--run", str(tmp_path / "run")) for node in ("0", "1")]
    assert [node.wait(120) for node in nodes] == [0, 0], (tmp_path / "output").read_text()
    run_ranks(2, tiny, "--run", str(tmp_path / "one"), output=tmp_path / "one-output")
    actual, expected = (RunFolder(tmp_path / name).read_metrics() for name in ("run", "one"))
    assert [line["loss"] for line in actual] == [line["loss"] for line in expected]


def test_the_environment_of_slurm_is_sufficient(tiny: str, tmp_path: Path, begin: Begin) -> None:
    common = {"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x1)", "SLURM_JOB_ID": str(free_port())}
    command = (
        sys.executable,
        "-m",
        "maelstream.jobs.pretrain",
        tiny,
        "--run",
        str(tmp_path / "run"),
        "--stop-at-step",
        "3",
    )
    for more, code in (({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}, 0), ({}, 2)):
        tasks = [begin(*command, SLURM_PROCID=task, SLURM_LOCALID=task, **common, **more) for task in ("0", "1")]
        assert [task.wait(120) for task in tasks] == [code, code], (tmp_path / "output").read_text()
    assert "srun sets no MASTER_ADDR" in (tmp_path / "output").read_text()


def test_torchrun_starts_pre_training(tiny: str, tmp_path: Path, begin: Begin) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ("--run", str(tmp_path / "run"), "--stop-at-step", "3")
    # After `--`: torchrun reads --run as an abbreviation of one of its own options.
    done = begin(*torchrun, "--module", "--", "maelstream.jobs.pretrain", tiny, *options)
    assert done.wait(120) == 0, (tmp_path / "output").read_text()
    assert RunFolder(tmp_path / "run").checkpoints.steps() == [3]
