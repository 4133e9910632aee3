"""Runs survive kills, damaged checkpoints, signals, full disks, NaN, hanging ranks and a second trainer.

These are the short versions of `make soak` (benchmarks/faults.py).
"""

import fcntl
import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from maelstream.jobs.distributed.health import SILENT
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.status import read_status
from tests.helpers.forked import Running, run_ranks, start

STEPS = 12


@pytest.fixture(scope="module")
def uninterrupted(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(2, tiny, "--run", str(folder / "run"), output=folder / "output")
    return RunFolder(folder / "run")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def begin(
    ranks: int, tiny: str, folder: RunFolder, *args: str, fault: str = "", faulty_rank: int | None = None
) -> Running:
    output = folder.path.with_name("output")
    return start(ranks, tiny, "--run", str(folder.path), *args, output=output, fault=fault, faulty_rank=faulty_rank)


def wait_for_step(folder: RunFolder, step: int, running: Running) -> None:
    end = time.monotonic() + 60
    while not any(line["step"] >= step for line in folder.read_metrics()):
        assert time.monotonic() < end and any(rank.is_alive() for rank in running.ranks), running.printed
        time.sleep(0.02)


def assert_same(ours: RunFolder, theirs: RunFolder) -> None:
    """Compares every loss and every parameter bit by bit."""
    losses = [[(line["step"], line["loss"]) for line in folder.read_metrics()] for folder in (ours, theirs)]
    assert losses[0] == losses[1]
    one, other = ours.checkpoints.weights(STEPS), theirs.checkpoints.weights(STEPS)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_run_that_is_killed_five_times_ends_with_the_same_weights(
    uninterrupted: RunFolder, tiny: str, folder: RunFolder
) -> None:
    draw = random.Random(0)
    for kill in range(5):
        running = begin(2, tiny, folder, "--checkpoint.every-steps", "1", fault="slow_save:0.05")
        wait_for_step(folder, 2 * kill + 1, running)
        time.sleep(draw.uniform(0, 0.2))
        running.kill()
    run_ranks(2, tiny, "--run", str(folder.path), output=folder.path.with_name("output"))
    assert_same(folder, uninterrupted)


@pytest.mark.parametrize("damage", ["cut", "removed", "flipped"])
def test_all_ranks_detect_a_damaged_checkpoint_and_use_the_older_one(
    uninterrupted: RunFolder, tiny: str, folder: RunFolder, damage: str
) -> None:
    run_ranks(2, tiny, "--run", str(folder.path), "--stop-at-step", "8", output=folder.path.with_name("output"))
    file = folder.checkpoints.at(8) / "moments-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "removed":
        file.unlink()
    else:
        data[len(data) // 2] ^= 16
        file.write_bytes(data if damage == "flipped" else data[:-100])
    done = run_ranks(2, tiny, "--run", str(folder.path), output=folder.path.with_name("output"))
    assert f"{folder.checkpoints.at(8)}: {file.name}" in done.printed
    assert "resuming from step-00000004" in done.printed and "step 5/12" in done.printed
    assert_same(folder, uninterrupted)


def test_a_run_without_a_good_checkpoint_does_not_restart_from_step_0(tiny: str, folder: RunFolder) -> None:
    run_ranks(2, tiny, "--run", str(folder.path), "--stop-at-step", "2", output=folder.path.with_name("output"))
    (folder.checkpoints.at(2) / "weights.safetensors").unlink()
    running = begin(2, tiny, folder)
    assert running.wait() == [2, 2]
    assert running.printed.count("no checkpoint is good") == 1  # one rank prints for all


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU])
def test_a_signal_to_any_rank_saves_and_ends_all_with_its_code(
    uninterrupted: RunFolder, tiny: str, folder: RunFolder, number: int
) -> None:
    running = begin(2, tiny, folder, fault="slow_save:0.1")
    wait_for_step(folder, 3, running)
    pid = running.ranks[1].pid
    assert pid is not None
    os.kill(pid, number)
    assert running.wait() == [128 + number] * 2
    last = folder.read_metrics()[-1]["step"]
    assert folder.checkpoints.steps()[-1] == last and last < STEPS
    status = read_status(folder.status)
    assert status is not None and (status.state, status.why) == ("stopped", signal.Signals(number).name)
    run_ranks(2, tiny, "--run", str(folder.path), output=folder.path.with_name("output"))
    assert_same(folder, uninterrupted)


def take_terminal() -> None:
    """Makes standard input this session's terminal; undoes nohup, under which a run does not end with its terminal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_run_whose_terminal_is_closed_saves(tiny: str, folder: RunFolder) -> None:
    """The terminal's end sends SIGHUP, and every later write to it fails."""
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "maelstream.jobs.pretrain", tiny, "--run", str(folder.path)]
    process = subprocess.Popen(
        [*command, "--optim.epochs", "400"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(terminal)
    deadline = time.monotonic() + 60
    while not (folder.metrics.exists() and folder.read_metrics()) and time.monotonic() < deadline:
        if select.select([master], [], [], 0.1)[0]:
            os.read(master, 2**16)
    os.close(master)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert folder.checkpoints.steps()[-1] == folder.read_metrics()[-1]["step"]


def test_a_rank_that_exceeds_the_grace_time_is_ended_and_older_checkpoints_stay(tiny: str, folder: RunFolder) -> None:
    running = begin(1, tiny, folder, "--health.grace-s", "1", fault="sleep_in_step:14")  # two forward passes per step
    wait_for_step(folder, 6, running)
    end = time.monotonic() + 30
    while not folder.checkpoints.steps() and time.monotonic() < end:  # a thread writes it, on a busy machine slowly
        time.sleep(0.01)
    running.kill(signal.SIGTERM)
    assert running.wait(20) == [143]
    assert folder.checkpoints.steps() == [4] and folder.checkpoints.fault(4) == ""


def test_nan_on_one_rank_skips_the_step_on_all_and_is_counted(tiny: str, folder: RunFolder) -> None:
    for zero, fault in ((1, "nan_loss:3"), (2, "nan_gradient:3"), (3, "nan_gradient:3")):
        other = RunFolder(folder.path.with_name(f"run{zero}"))
        options = ("--engine.zero", str(zero), "--stop-at-step", "5")
        running = begin(2, tiny, other, *options, fault=fault, faulty_rank=1)
        assert running.wait() == [0, 0], running.printed
        lines = other.read_metrics()
        assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1]
        assert [line["loss"] is None for line in lines] == [False, False, True, False, False]
        assert json.loads((other.checkpoints.at(5) / "state.json").read_text())["optimizer_steps"] == 4
        assert all(weight.isfinite().all() for weight in other.checkpoints.weights(5).values())


def test_nan_in_many_steps_in_a_row_stops_the_run_with_the_last_good_checkpoint(tiny: str, folder: RunFolder) -> None:
    running = begin(2, tiny, folder, "--health.bad-steps", "3", fault="nan_loss:6-99", faulty_rank=0)
    assert running.wait() == [2, 2]
    assert "NaN or Inf in 3 steps in a row, up to step 8" in running.printed
    assert running.printed.count(str(folder.checkpoints.at(4))) == 1
    status = read_status(folder.status)
    assert status is not None and status.state == "failed" and "NaN" in status.why


@pytest.mark.parametrize(("fault", "why"), [("stop_process:4", "are stopped"), ("sleep_in_step:4", "come further")])
def test_a_silent_rank_is_named_and_the_run_ends(tiny: str, folder: RunFolder, fault: str, why: str) -> None:
    running = begin(2, tiny, folder, "--health.silent-s", "3", fault=fault, faulty_rank=1)
    running.ranks[0].join(25)
    codes = running.wait(1)
    assert SILENT in codes and 0 not in codes  # one rank may lose the other; a stopped process cannot exit
    assert "maelstream: rank 1: silent for 3 s" in running.printed and why in running.printed


def test_a_second_trainer_is_rejected_and_a_dead_trainer_leaves_no_lock(tiny: str, folder: RunFolder) -> None:
    first = begin(1, tiny, folder, fault="sleep_in_step:4")  # two forward passes per step
    wait_for_step(folder, 1, first)
    second = start(2, tiny, "--run", str(folder.path), output=folder.path.with_name("second"))
    assert second.wait() == [2, 2]
    assert second.printed.count("is being trained already (host ") == 1
    first.kill()
    run_ranks(2, tiny, "--run", str(folder.path), "--stop-at-step", "2", output=folder.path.with_name("output"))


def test_a_full_disk_leaves_older_checkpoints_intact_and_training_continues(tiny: str, folder: RunFolder) -> None:
    running = begin(
        2, tiny, folder, fault="full_disk:3", faulty_rank=1
    )  # the checkpoint of step 8: 2 files per checkpoint
    assert running.wait() == [0, 0], running.printed
    assert "step-00000008 cannot be written" in running.printed and "training continues" in running.printed
    assert folder.checkpoints.steps() == [4, 12]
    assert not list(folder.checkpoints.folder.glob("*.writing"))


def test_a_last_save_that_fails_is_an_error(tiny: str, folder: RunFolder) -> None:
    running = begin(2, tiny, folder, "--stop-at-step", "8", fault="full_disk:3-99", faulty_rank=1)
    assert running.wait() == [2, 2]
    assert running.printed.count("the older checkpoints are whole") == 1
    assert folder.checkpoints.steps() == [4] and folder.checkpoints.fault(4) == ""


def test_a_rank_that_loses_another_reports_it_in_one_line(tiny: str, folder: RunFolder) -> None:
    running = begin(2, tiny, folder, fault="die:5", faulty_rank=1)
    assert running.wait() == [69, -9]
    assert "rank 0 lost another rank" in running.printed and "Traceback" not in running.printed
