"""`maelstream launch --nproc N pretrain RECIPE --run DIR`: starts ranks, watches them, and starts them again.

One machine: `--nproc`. Many: the same command on each with `--nnodes`, `--node-rank` and `--master`, or once with
`--hostfile`, which starts it on every host through ssh. What the ranks do with a failure is theirs (maelstream.jobs.distributed.health, the
checkpoints); the launcher ends what is left of them, and returns their true exit code. No rank outlives it
(maelstream.jobs.distributed.parent_death).
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Annotated

import tyro

from maelstream.jobs.arguments import parsed
from maelstream.shards.errors import MaelstreamError

_LAUNCHED = ("pretrain", "profile", "finetune", "linprobe", "partial", "scratch", "evaluate", "knn")
_POLL_S = 0.1
_KILL_AFTER_S = 10.0  # from the first rank's failure to the end of the others
_LOST = 69  # exit code of a rank that lost another: the other's tells more
_STOPPED = {128 + number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
_USERS_ERROR = 2


class LaunchError(MaelstreamError):
    """Ranks that cannot be started as asked."""


@dataclass(frozen=True)
class Launch:
    """Start a command's ranks here, or on many hosts; after a failure start them again, on those that are left."""

    command: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="pretrain RECIPE ...")]
    """What every rank runs."""
    nproc: int | None = None
    """Ranks on this machine; one a GPU if not given."""
    max_restarts: int = 0
    """How often to start again after a failure. A rank that fails first twice in a row is left out from then on, and so
    is a host that no longer answers: checkpoints load on any number of ranks."""
    nnodes: int = 1
    node_rank: int = 0
    master: str = ""
    """HOST:PORT of the machine with node rank 0, on every machine the same; a free port of this one if not given."""
    hostfile: Path | None = None
    """A line a host, `HOST slots=N`: starts all of them from here, through ssh without a password."""


@dataclass(frozen=True)
class Host:
    """A line of a hostfile."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """LaunchError for a file that cannot be read, a line that is no host, or hosts with unequal slots."""
    try:
        lines = [line.partition("#")[0].split() for line in path.read_text().splitlines()]
    except OSError as error:
        raise LaunchError(f"--hostfile {path} cannot be read ({error.strerror})") from None
    hosts = []
    for number, words in enumerate(lines, 1):
        if not words:
            continue
        name, *rest = words
        if len(rest) != 1 or not rest[0].startswith("slots=") or not rest[0].removeprefix("slots=").isdigit():
            raise LaunchError(f"{path}, line {number}: {' '.join(words)!r} is not like `HOST slots=8`")
        hosts.append(Host(name, int(rest[0].removeprefix("slots="))))
    if not hosts:
        raise LaunchError(f"{path} names no host")
    if len({host.slots for host in hosts}) > 1:
        raise LaunchError(f"{path}: every host must have as many slots; these have {[host.slots for host in hosts]}")
    return hosts


def free_port() -> int:
    """LaunchError when this machine has none left."""
    try:
        with socket.socket() as free:
            free.bind(("", 0))
            return free.getsockname()[1]
    except OSError as error:
        raise LaunchError(f"no free port for the ranks to meet at ({error.strerror}); see `ss -tan`") from None


def gpus() -> int:
    """How many this machine has now; asked in a process of its own, so that a restart sees one that fell out."""
    asked = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True) if _has_nvidia_smi() else None
    return len(asked.stdout.splitlines()) if asked is not None and asked.returncode == 0 else 0


def _has_nvidia_smi() -> bool:
    return any(Path(folder, "nvidia-smi").exists() for folder in os.environ.get("PATH", "").split(os.pathsep))


class Signals:
    """Hands signals on to processes; use it as a context manager, in the main thread."""

    def __init__(self) -> None:
        self.received = 0
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Signals":
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self._before = {number: signal.signal(number, self._hand_on) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def to(self, processes: list[subprocess.Popen]) -> None:
        self._processes = processes
        if self.received:  # while they were being started
            _send(processes, self.received)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        _send(self._processes, number)


def _send(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


def supervise(processes: list[subprocess.Popen], signals: Signals) -> tuple[int, int]:
    """Waits for all; after the first failure the others have `_KILL_AFTER_S` to end by themselves.

    Returns the exit code that tells most (0 when all ended well; 128 + number for one that a signal killed), and the
    place of the process that ended with it.
    """
    codes: dict[int, int] = {}
    deadline = None
    signals.to(processes)
    try:
        while len(codes) < len(processes):
            for place, process in enumerate(processes):
                if place not in codes and (code := process.poll()) is not None:
                    codes[place] = code if code >= 0 else 128 - code
            failed = [code for code in codes.values() if code]
            if failed and deadline is None:
                deadline = time.monotonic() + _KILL_AFTER_S
            if deadline is not None and time.monotonic() > deadline and not set(failed) <= _STOPPED:
                _send([process for place, process in enumerate(processes) if place not in codes], signal.SIGKILL)
            time.sleep(_POLL_S)
    finally:
        _send([process for process in processes if process.poll() is None], signal.SIGKILL)
    failures = [(place, code) for place, code in codes.items() if code]  # in the order in which they ended
    telling = [failure for failure in failures if failure[1] != _LOST] or failures
    place, code = telling[0] if telling else (0, 0)
    return code, place


@dataclass(frozen=True)
class Local:
    """Ranks on this machine."""

    launch: Launch
    devices: tuple[int, ...]
    """Local numbers of those that take part; GPUs, where there are any."""

    def start(self, port: int) -> list[subprocess.Popen]:
        """One process a device, in the order of `devices`, each in a session of its own: Ctrl-C comes through us."""
        launch, count = self.launch, len(self.devices)
        host, _, given = launch.master.rpartition(":")
        common = os.environ | {
            "WORLD_SIZE": str(count * launch.nnodes),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": host or "127.0.0.1",
            "MASTER_PORT": given or str(port),
            "MAELSTREAM_LAUNCHER": str(os.getpid()),
        }
        if gpus() and "CUDA_VISIBLE_DEVICES" not in os.environ:
            common["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.devices))
        processes = []
        for local in range(count):
            rank = {"RANK": str(launch.node_rank * count + local), "LOCAL_RANK": str(local)}
            command = [sys.executable, "-m", "maelstream.jobs.command", *launch.command]
            processes.append(subprocess.Popen(command, env=common | rank, start_new_session=True))
        return processes

    def without(self, place: int) -> "Local":
        """Without the device at `place` of `devices`."""
        return replace(self, devices=self.devices[:place] + self.devices[place + 1 :])


@dataclass(frozen=True)
class Remote:
    """This launcher on many hosts."""

    launch: Launch
    hosts: tuple[Host, ...]

    def start(self, port: int) -> list[subprocess.Popen]:
        """One ssh a host; what it starts there ends when ssh does, because its input ends then."""
        options = ["--nnodes", str(len(self.hosts)), "--master", f"{self.hosts[0].name}:{port}"]
        processes = []
        for number, host in enumerate(self.hosts):
            node = ["--nproc", str(host.slots), "--node-rank", str(number), *options]
            maelstream = [sys.executable, "-m", "maelstream.jobs.command", "launch", *node, *self.launch.command]
            environment = [f"{name}={value}" for name, value in os.environ.items() if _travels(name)]
            remote = (
                f"cd {shlex.quote(os.getcwd())} && exec env MAELSTREAM_STDIN=1 {shlex.join(environment + maelstream)}"
            )
            processes.append(
                subprocess.Popen([*_SSH, host.name, remote], stdin=subprocess.PIPE, start_new_session=True)
            )
        return processes

    def reachable(self) -> "Remote":
        """Only those hosts that answer; LaunchError when none does."""
        asked = [(host, subprocess.Popen([*_SSH, host.name, "true"], stdin=subprocess.DEVNULL)) for host in self.hosts]
        answering = tuple(host for host, process in asked if process.wait() == 0)
        if not answering:
            raise LaunchError(f"none of {', '.join(host.name for host in self.hosts)} answers ssh")
        return replace(self, hosts=answering)


_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")


def _travels(name: str) -> bool:
    return name.startswith(("NCCL_", "AWS_")) or name in ("PYTHONPATH", "OMP_NUM_THREADS")


def _say(text: str) -> None:
    print(f"maelstream launch: {text}", file=sys.stderr, flush=True)


def run_local(launch: Launch) -> int:
    """Exit code of the ranks of this machine, after restarts."""
    ranks = Local(launch, tuple(range(_nproc(launch))))
    culprit = None  # device of the rank that failed first, the last time
    with Signals() as signals:
        for restarts_left in range(launch.max_restarts, -1, -1):
            code, place = supervise(ranks.start(free_port()), signals)
            if code in (0, _USERS_ERROR) or code in _STOPPED or signals.received or not restarts_left:
                return code
            device = ranks.devices[place]
            if device == culprit and len(ranks.devices) > 1 and launch.nnodes == 1:
                ranks = ranks.without(place)
                _say(f"device {device} failed first twice in a row and is left out")
            culprit = device
            _say(
                f"rank {place} ended with exit code {code}; starting {len(ranks.devices)} ranks from the last good "
                f"checkpoint, {restarts_left - 1} restarts left"
            )
    raise AssertionError("the loop returns")


def run_hosts(launch: Launch) -> int:
    """Exit code of the ranks of all hosts, after restarts."""
    assert launch.hostfile is not None
    wanted = Remote(launch, tuple(read_hostfile(launch.hostfile)))
    hosts = wanted.reachable()
    if missing := [host.name for host in wanted.hosts if host not in hosts.hosts]:
        raise LaunchError(
            f"{', '.join(missing)} of {launch.hostfile} cannot be reached through ssh; mend it, or take the line out"
        )
    with Signals() as signals:
        for restarts_left in range(launch.max_restarts, -1, -1):
            code, place = supervise(hosts.start(free_port()), signals)
            if code in (0, _USERS_ERROR) or code in _STOPPED or signals.received or not restarts_left:
                return code
            name, hosts = hosts.hosts[place].name, hosts.reachable()
            _say(
                f"{name} ended with exit code {code}; starting on {', '.join(host.name for host in hosts.hosts)}, "
                f"{restarts_left - 1} restarts left"
            )
    raise AssertionError("the loop returns")


def _nproc(launch: Launch) -> int:
    """LaunchError for more ranks than GPUs, or none to start."""
    count = gpus()
    if launch.nproc is None:
        if not count:
            raise LaunchError("this machine shows no GPU; say with --nproc how many ranks to start on its cores")
        return count
    if launch.nproc < 1 or (count and launch.nproc > count):
        raise LaunchError(
            f"--nproc {launch.nproc}: this machine has {count or 'no'} GPUs; start 1 to {count or 'many'}"
        )
    return launch.nproc


@contextlib.contextmanager
def _while_input_lasts() -> Iterator[None]:
    """Under ssh: ends this launcher, and with it its ranks, when the one that started it is gone."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    if "MAELSTREAM_STDIN" in os.environ:
        threading.Thread(target=watch, name="input", daemon=True).start()
    yield


def main(args: list[str]) -> int:
    """`maelstream launch`; the exit code of the ranks."""
    cut = next((place for place, arg in enumerate(args) if arg in _LAUNCHED), len(args))
    if cut == len(args) and not {"-h", "--help"} & set(args):
        raise LaunchError("give the command after the options: `maelstream launch --nproc 8 pretrain RECIPE --run DIR`")
    launch = replace(
        parsed(Launch, args[:cut], "launch", Launch(command=())),
        command=tuple(args[cut:]),
    )
    if launch.max_restarts < 0 or launch.nnodes < 1 or not 0 <= launch.node_rank < launch.nnodes:
        raise LaunchError("--max-restarts and --node-rank start at 0, --nnodes at 1, and --node-rank is below --nnodes")
    if launch.hostfile is not None:
        return run_hosts(launch)
    if launch.nnodes > 1 and ":" not in launch.master:
        raise LaunchError("--nnodes needs --master HOST:PORT, the same on every machine")
    with _while_input_lasts():
        return run_local(launch)
