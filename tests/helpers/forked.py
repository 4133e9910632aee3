"""Starts ranks fast: they are forked from a process that has imported everything.

No launcher is involved; tests/e2e/test_launch.py starts real launchers.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.helpers.preloaded"])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _rank(command: str, args: list[str], environment: dict[str, str], output: Path, fault: str) -> None:
    from maelstream.jobs.command import run
    from tests.helpers import faults

    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which these tests would ignore under nohup
    os.environ.update(environment)
    if fault:
        faults.FAULTS[fault.partition(":")[0]](fault.partition(":")[2])
    code = run(command, args)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


@dataclass(frozen=True)
class Running:
    """Ranks that run."""

    ranks: list[ForkServerProcess]
    output: Path

    def wait(self, timeout_s: float = 120) -> list[int]:
        """Waits and returns the exit codes by rank; ranks that still run after `timeout_s` are killed (-9)."""
        end = time.monotonic() + timeout_s
        for rank in self.ranks:
            rank.join(max(0.0, end - time.monotonic()))
        self.kill()
        return [rank.exitcode or 0 for rank in self.ranks]

    def kill(self, number: int = signal.SIGKILL) -> None:
        for rank in self.ranks:
            if rank.is_alive():
                assert rank.pid is not None
                os.kill(rank.pid, number)
        if number == signal.SIGKILL:
            for rank in self.ranks:
                rank.join()

    @property
    def printed(self) -> str:
        return self.output.read_text()


def start(
    ranks: int, *args: str, output: Path, fault: str = "", faulty_rank: int | None = None, command: str = "pretrain"
) -> Running:
    """Starts `COMMAND ARGS`; injects `fault` of tests/helpers/faults.py into all ranks, or into `faulty_rank`."""
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(free_port())
    output.write_text("")
    processes = []
    for rank in range(ranks):
        environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        mine = fault if faulty_rank in (None, rank) else ""
        processes.append(CONTEXT.Process(target=_rank, args=(command, list(args), environment, output, mine)))
        processes[-1].start()
    return Running(processes, output)


def run_ranks(
    ranks: int, *args: str, output: Path, fault: str = "", faulty_rank: int | None = None, command: str = "pretrain"
) -> Running:
    """Starts ranks and waits; all exit codes must be 0."""
    running = start(ranks, *args, output=output, fault=fault, faulty_rank=faulty_rank, command=command)
    codes = running.wait()
    assert codes == [0] * ranks, f"{codes}\n{running.printed}"
    return running
