"""The launcher with shell scripts as ranks, which exit as each test needs. Real ranks: tests/e2e/test_launch.py."""

import os
import re
import shlex
import sys
import time
from pathlib import Path

import pytest

from maelstream.jobs.command import run
from maelstream.jobs.distributed import launching
from maelstream.jobs.distributed.launching import LocalRanks

PYTHON = sys.executable
RANK_SCRIPT = """#!/bin/bash
# `python -m maelstream.jobs.command pretrain BEHAVIOUR ...`; each start adds a line to the file $LOG.
echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR" >> "$LOG"
eval "$4"
"""
SSH_SCRIPT = """#!/bin/bash
# `ssh -o .. -o .. HOST COMMAND` on this machine; hosts named gone* and those in the file DOWN do not answer.
case "$5" in gone*) exit 255;; esac
if [ -e "$DOWN" ] && grep -q "^$5$" "$DOWN"; then exit 255; fi
exec bash -c "$6"
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file to which the rank scripts write their numbers; `ssh` is replaced by a script too."""
    for name, text in (("rank", RANK_SCRIPT), ("ssh", SSH_SCRIPT)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("DOWN", str(tmp_path / "down"))
    monkeypatch.setattr(launching.sys, "executable", str(tmp_path / "rank"))
    monkeypatch.setattr(launching, "gpu_count", lambda: 0)
    return tmp_path / "log"


def starts(log: Path) -> list[str]:
    """Ranks of each start, as RANK/WORLD_SIZE."""
    return [line.split()[0] for line in log.read_text().splitlines()]


def test_ranks_receive_their_numbers_and_all_must_succeed(log: Path) -> None:
    assert run("launch", ["--nproc", "3", "pretrain", "exit 0"]) == 0
    assert sorted(log.read_text().splitlines()) == [f"{n}/3 {n}/3 127.0.0.1" for n in range(3)]


def test_the_exit_code_is_that_of_the_rank_that_failed_first(log: Path) -> None:
    """Rank 0 loses rank 1, and may end before the launcher notices that rank 1 has ended."""
    assert run("launch", ["--nproc", "2", "pretrain", "[ $RANK = 0 ] && exit 69; sleep 0.5; exit 41"]) == 41
    assert run("launch", ["--nproc", "2", "pretrain", "[ $RANK = 1 ] && kill -9 $$; exit 69"]) == 137


def test_ranks_that_do_not_end_by_themselves_are_killed(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_KILL_AFTER_S", 0.5)
    start = time.monotonic()
    assert run("launch", ["--nproc", "2", "pretrain", "[ $RANK = 0 ] && exit 3; kill -STOP $$; sleep 100"]) == 3
    assert time.monotonic() - start < 5


def test_ranks_that_still_start_end_when_a_signal_has_stopped_one(log: Path) -> None:
    """They would wait for it for ever."""
    start = time.monotonic()
    waiting = "[ $RANK = 0 ] && kill -TERM $$; trap 'exit 143' TERM; while :; do sleep 0.1; done"
    assert run("launch", ["--nproc", "2", "pretrain", waiting]) == 143
    assert time.monotonic() - start < 5


def test_ranks_restart_after_a_failure_without_a_rank_that_fails_first_twice(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    behaviour = "[ $WORLD_SIZE = 3 ] && { [ $RANK = 1 ] && exit 9; sleep 0.5; exit 69; }; exit 0"
    assert run("launch", ["--nproc", "3", "--max-restarts", "3", "pretrain", behaviour]) == 0
    assert [starts(log).count(f"0/{world}") for world in (3, 2)] == [2, 1]
    assert "device 1 failed first twice in a row and is left out" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "count"), [(2, 1), (143, 1), (5, 3)])
def test_a_user_error_and_a_signal_are_not_retried(log: Path, code: int, count: int) -> None:
    assert run("launch", ["--nproc", "1", "--max-restarts", "2", "pretrain", f"exit {code}"]) == code
    assert len(starts(log)) == count


def test_the_ranks_of_two_nodes_are_numbered_together(log: Path) -> None:
    for node in ("0", "1"):
        options = ["--nproc", "2", "--nnodes", "2", "--node-rank", node, "--master", "10.0.0.1:29500"]
        assert run("launch", [*options, "pretrain", "exit 0"]) == 0
    assert sorted(log.read_text().splitlines()) == [
        "0/4 0/2 10.0.0.1",
        "1/4 1/2 10.0.0.1",
        "2/4 0/2 10.0.0.1",
        "3/4 1/2 10.0.0.1",
    ]


def hostfile(folder: Path, text: str) -> str:
    (folder / "hosts").write_text(text)
    return str(folder / "hosts")


def test_a_hostfile_starts_a_launcher_on_each_host_and_continues_without_a_lost_host(log: Path, tmp_path: Path) -> None:
    """The launchers that ssh starts are real."""
    rank = tmp_path / "rank"
    launcher = (
        f"import sys; from maelstream.jobs import launch; from maelstream.jobs.distributed import launching; "
        f"launching.sys.executable, launching.gpu_count = {str(rank)!r}, lambda: 0; "
        "sys.exit(launch.main(sys.argv[4:]))"
    )
    rank.write_text(
        f"""#!/bin/bash
if [ "$3" = launch ]; then exec {PYTHON} -c {shlex.quote(launcher)} "$@"; fi
echo "$RANK/$WORLD_SIZE" >> "$LOG"
eval "$4"
"""
    )
    hosts = hostfile(tmp_path, "one slots=2  # the first\n\ntwo slots=2\n")
    behaviour = (
        f"[ $WORLD_SIZE = 4 ] && {{ echo two > {tmp_path / 'down'}; [ $RANK = 2 ] && exit 7; exit 69; }}; exit 0"
    )
    assert run("launch", ["--hostfile", hosts, "--max-restarts", "1", "pretrain", behaviour]) == 0
    assert set(starts(log)) == {"0/4", "1/4", "2/4", "3/4", "0/2", "1/2"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("gone1 slots=2\nhere slots=2\n", "gone1 of .* cannot be reached through ssh"),
        ("gone1 slots=2\n", "none of gone1 answers ssh"),
        ("here\n", "line 1: 'here' is not like `HOST slots=8`"),
        ("here slots=0\n", "line 1: 'here slots=0' is not like `HOST slots=8`"),
        ("a slots=2\nb slots=2\na slots=2\n", "line 3: a is listed twice"),
        ("a slots=2\nb slots=3\n", "every host must have as many slots"),
        ("# nobody\n", "names no host"),
    ],
)
def test_a_bad_hostfile_is_an_error_of_one_line(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    assert run("launch", ["--hostfile", hostfile(tmp_path, text), "pretrain", "exit 0"]) == 2
    printed = capsys.readouterr().err
    assert re.search(complaint, printed)
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--nproc", "2"], "give the command after the options"),
        (["--nproc", "0", "pretrain"], "--nproc 0"),
        (["pretrain"], "shows no GPU; say with --nproc"),
        (["--nproc", "1", "--nnodes", "2", "pretrain"], "--nnodes needs --master HOST:PORT"),
        (["--hostfile", "nowhere", "pretrain"], "--hostfile nowhere cannot be read"),
    ],
)
def test_bad_options_are_an_error_of_one_line(
    log: Path, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    assert run("launch", options) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1


def test_more_ranks_than_gpus_are_an_error_of_one_line(
    log: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "gpu_count", lambda: 2)
    assert run("launch", ["--nproc", "3", "pretrain"]) == 2
    assert "--nproc 3: this machine has 2 GPUs; start 1 to 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, "0,2"), ("5,6,7", "5,7"), ("GPU-a,MIG-b,GPU-c", "GPU-a,GPU-c")]
)
def test_ranks_see_the_gpus_that_the_user_allows(
    log: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: str
) -> None:
    """Of three GPUs, the second is left out after a failure."""
    monkeypatch.setattr(launching, "gpu_count", lambda: 3)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    started = []
    monkeypatch.setattr(launching.subprocess, "Popen", lambda *_, env, **__: started.append(env))
    LocalRanks(("pretrain",), (0, 1, 2), 1, 0, "").without(1).start(1234)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in started] == [expected] * 2


def test_gpus_are_counted_by_cuda_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launching.gpu_count() == 0  # without a driver
    (tmp_path / "nvidia-smi").touch()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$2" in *device_count*) echo 2;; esac\n')
    python.chmod(0o755)
    monkeypatch.setattr(launching.sys, "executable", str(python))
    assert launching.gpu_count() == 2


def test_no_free_port_is_an_error_of_one_line(
    log: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __init__(self) -> None:
            raise OSError(98, "Address already in use")

    monkeypatch.setattr(launching.socket, "socket", Full)
    assert run("launch", ["--nproc", "1", "pretrain", "exit 0"]) == 2
    assert "no free port for the ranks to meet at" in capsys.readouterr().err
