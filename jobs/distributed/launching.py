"""Starts ranks on this machine or launchers on many hosts, watches them, and starts them again after a failure.

What a rank does after a failure is decided elsewhere (`jobs/distributed/health.py`, the checkpoints). This module ends
the ranks that are left and finds the exit code of the rank that caused the failure. No rank outlives its launcher
(`jobs/distributed/parent_death.py`).
"""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from maelstream.jobs.distributed.stop import SIGNALS, handled_signals
from maelstream.shards.errors import MaelstreamError

_POLL_S = 0.1
_KILL_AFTER_S = 10.0  # from the first rank's failure until the others are killed
_LOST_RANK = 69  # exit code of a rank that lost another one, whose exit code says more
_STOPPED = {128 + number for number in SIGNALS}
_USERS_ERROR = 2


class LaunchError(MaelstreamError):
    """Ranks that cannot be started with these options."""


@dataclass(frozen=True)
class Host:
    """One line of a hostfile."""

    name: str
    slots: int
    """Ranks on this host."""


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file with one line per host.

    Raises:
        LaunchError: the file cannot be read, a line is not like `HOST slots=8`, or the slots differ.
    """
    try:
        lines = [line.partition("#")[0].split() for line in path.read_text().splitlines()]
    except OSError as error:
        raise LaunchError(f"--hostfile {path} cannot be read ({error.strerror})") from None
    hosts: list[Host] = []
    for number, words in enumerate(lines, 1):
        if not words:
            continue
        name, *rest = words
        if len(rest) != 1 or not re.fullmatch(r"slots=0*[1-9]\d{0,4}", rest[0]):
            raise LaunchError(f"{path}, line {number}: {' '.join(words)!r} is not like `HOST slots=8`")
        if name in {host.name for host in hosts}:
            raise LaunchError(f"{path}, line {number}: {name} is listed twice; write its slots on one line")
        hosts.append(Host(name, int(rest[0].removeprefix("slots="))))
    if not hosts:
        raise LaunchError(f"{path} names no host")
    if len({host.slots for host in hosts}) > 1:
        raise LaunchError(f"{path}: every host must have as many slots; these have {[host.slots for host in hosts]}")
    return hosts


def free_port() -> int:
    """A free TCP port of this machine; raises LaunchError if there is none."""
    try:
        with socket.socket() as free:
            free.bind(("", 0))
            return free.getsockname()[1]
    except OSError as error:
        raise LaunchError(f"no free port for the ranks to meet at ({error.strerror}); see `ss -tan`") from None


def gpu_count() -> int:
    """Number of GPUs that this process may use now: CUDA_VISIBLE_DEVICES and MIG instances count as CUDA counts them.

    A child process counts them, so that after a restart a GPU that failed is no longer counted. Without a driver, torch
    is not imported for it.
    """
    if not any(Path(folder, "nvidia-smi").exists() for folder in os.environ.get("PATH", "").split(os.pathsep)):
        return 0
    count = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    counted = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True)
    return int(counted.stdout) if counted.returncode == 0 else 0


def rank_count(nproc: int | None) -> int:
    """Number of ranks to start on this machine; one per GPU if `nproc` is None.

    Raises:
        LaunchError: more ranks than GPUs, no GPU and no `nproc`, or fewer than 1.
    """
    count = gpu_count()
    if nproc is None:
        if not count:
            raise LaunchError("this machine shows no GPU; say with --nproc how many ranks to start on its cores")
        return count
    if nproc < 1 or (count and nproc > count):
        raise LaunchError(f"--nproc {nproc}: this machine has {count or 'no'} GPUs; start 1 to {count or 'many'}")
    return nproc


class SignalForwarder:
    """Forwards the signals that stop training to processes; a context manager for the main thread."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the last signal; 0 before the first one."""
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> "SignalForwarder":
        self._before = {number: signal.signal(number, self._forward) for number in handled_signals()}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def forward_to(self, processes: list[subprocess.Popen]) -> None:
        """From now on signals go to these processes."""
        self._processes = processes
        if self.received:  # while they were being started
            _send(processes, self.received)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        _send(self._processes, number)


def _send(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


def supervise(processes: list[subprocess.Popen], signals: SignalForwarder) -> tuple[int, int]:
    """Waits for all processes; after the first failure the others have `_KILL_AFTER_S` seconds to end by themselves.

    When a signal has stopped one of them, the others get SIGTERM: those that still start would wait for it for ever,
    and those that train stop and save anyway.

    Returns:
        The exit code of the first process that failed (0 if none did; 128 + number for one that a signal killed), and
        the index of that process. A rank that only lost another one is the cause only if no other rank failed.
    """
    codes: dict[int, int] = {}
    deadline, stopping = None, False
    signals.forward_to(processes)
    try:
        while len(codes) < len(processes):
            for index, process in enumerate(processes):
                if index not in codes and (code := process.poll()) is not None:
                    codes[index] = code if code >= 0 else 128 - code
                    if codes[index] in _STOPPED and not stopping:
                        stopping = True
                        _send([other for other in processes if other.poll() is None], signal.SIGTERM)
            failed = [code for code in codes.values() if code]
            if failed and deadline is None:
                deadline = time.monotonic() + _KILL_AFTER_S
            if deadline is not None and time.monotonic() > deadline and not set(failed) <= _STOPPED:
                _send([process for index, process in enumerate(processes) if index not in codes], signal.SIGKILL)
            time.sleep(_POLL_S)
    finally:
        _send([process for process in processes if process.poll() is None], signal.SIGKILL)
    failures = [(index, code) for index, code in codes.items() if code]  # in the order in which they ended
    causes = [failure for failure in failures if failure[1] != _LOST_RANK] or failures
    index, code = causes[0] if causes else (0, 0)
    return code, index


@dataclass(frozen=True)
class LocalRanks:
    """The ranks of one command on this machine."""

    command: tuple[str, ...]
    """What every rank runs, without `maelstream`."""
    devices: tuple[int, ...]
    """Local numbers of the devices that take part; GPUs if the machine has any."""
    nnodes: int = 1
    node_rank: int = 0
    master: str = ""
    """HOST:PORT of the machine with node rank 0; this machine if empty."""

    def start(self, port: int) -> list[subprocess.Popen]:
        """Starts one process per device, in the order of `devices`.

        Each gets a session of its own, so that Ctrl-C reaches it only through the launcher.
        """
        count = len(self.devices)
        host, _, given_port = self.master.rpartition(":")
        common = os.environ | {
            "WORLD_SIZE": str(count * self.nnodes),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": host or "127.0.0.1",
            "MASTER_PORT": given_port or str(port),
            "MAELSTREAM_LAUNCHER": str(os.getpid()),
        }
        if gpus := gpu_count():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
            common["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[device] for device in self.devices)
        processes = []
        for local in range(count):
            rank = {"RANK": str(self.node_rank * count + local), "LOCAL_RANK": str(local)}
            command = [sys.executable, "-m", "maelstream.jobs.command", *self.command]
            processes.append(subprocess.Popen(command, env=common | rank, start_new_session=True))
        return processes

    def without(self, index: int) -> "LocalRanks":
        """The ranks without the device at `index` of `devices`."""
        return replace(self, devices=self.devices[:index] + self.devices[index + 1 :])


@dataclass(frozen=True)
class RemoteLaunchers:
    """One launcher per host, for a command whose ranks are on many hosts."""

    command: tuple[str, ...]
    hosts: tuple[Host, ...]

    def start(self, port: int) -> list[subprocess.Popen]:
        """Starts one ssh per host. What it starts there ends when ssh ends, because its input ends then."""
        options = ["--nnodes", str(len(self.hosts)), "--master", f"{self.hosts[0].name}:{port}"]
        processes = []
        for number, host in enumerate(self.hosts):
            node = ["--nproc", str(host.slots), "--node-rank", str(number), *options]
            maelstream = [sys.executable, "-m", "maelstream.jobs.command", "launch", *node, *self.command]
            environment = [f"{name}={value}" for name, value in os.environ.items() if _is_sent(name)]
            remote = (
                f"cd {shlex.quote(os.getcwd())} && exec env MAELSTREAM_STDIN=1 {shlex.join(environment + maelstream)}"
            )
            processes.append(
                subprocess.Popen([*_SSH, host.name, remote], stdin=subprocess.PIPE, start_new_session=True)
            )
        return processes

    def reachable(self) -> "RemoteLaunchers":
        """The hosts that answer ssh; raises LaunchError if none does."""
        probes = [(host, subprocess.Popen([*_SSH, host.name, "true"], stdin=subprocess.DEVNULL)) for host in self.hosts]
        answering = tuple(host for host, process in probes if process.wait() == 0)
        if not answering:
            raise LaunchError(f"none of {', '.join(host.name for host in self.hosts)} answers ssh")
        return replace(self, hosts=answering)


_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")


def _is_sent(name: str) -> bool:
    """Whether an environment variable is set on the other hosts too."""
    limits = ("MAELSTREAM_CONNECT_TIMEOUT_S", "MAELSTREAM_READ_TIMEOUT_S")
    return name.startswith(("NCCL_", "AWS_")) or name in ("PYTHONPATH", "OMP_NUM_THREADS", *limits)


def _print(text: str) -> None:
    print(f"maelstream launch: {text}", file=sys.stderr, flush=True)


def run_local(ranks: LocalRanks, max_restarts: int) -> int:
    """Runs the ranks of this machine, with restarts after failures; returns their exit code.

    A device whose rank fails first twice in a row is left out afterwards.
    """
    suspect = None  # device of the rank that failed first, the last time
    _end_with_input()
    with SignalForwarder() as signals:
        for restarts_left in range(max_restarts, -1, -1):
            code, index = supervise(ranks.start(free_port()), signals)
            if code in (0, _USERS_ERROR) or code in _STOPPED or signals.received or not restarts_left:
                return code
            device = ranks.devices[index]
            if device == suspect and len(ranks.devices) > 1 and ranks.nnodes == 1:
                ranks = ranks.without(index)
                _print(f"device {device} failed first twice in a row and is left out")
            suspect = device
            _print(
                f"rank {index} ended with exit code {code}; starting {len(ranks.devices)} ranks from the last good "
                f"checkpoint, {restarts_left - 1} restarts left"
            )
    raise AssertionError("the loop returns")


def run_hosts(launchers: RemoteLaunchers, max_restarts: int) -> int:
    """Runs the ranks of all hosts, with restarts on the hosts that still answer; returns their exit code.

    Raises:
        LaunchError: at the start, a host does not answer.
    """
    hosts = launchers.reachable()
    if missing := [host.name for host in launchers.hosts if host not in hosts.hosts]:
        raise LaunchError(
            f"{', '.join(missing)} of the hostfile cannot be reached through ssh; repair it, or remove its line"
        )
    with SignalForwarder() as signals:
        for restarts_left in range(max_restarts, -1, -1):
            code, index = supervise(hosts.start(free_port()), signals)
            if code in (0, _USERS_ERROR) or code in _STOPPED or signals.received or not restarts_left:
                return code
            name, hosts = hosts.hosts[index].name, hosts.reachable()
            _print(
                f"{name} ended with exit code {code}; starting on {', '.join(host.name for host in hosts.hosts)}, "
                f"{restarts_left - 1} restarts left"
            )
    raise AssertionError("the loop returns")


def _end_with_input() -> None:
    """Under ssh or a sweep: kills this launcher, and with it its ranks, when the process that started it has ended."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    if "MAELSTREAM_STDIN" in os.environ:
        threading.Thread(target=watch, name="input", daemon=True).start()
