"""The process that trains a run now (`run.lock`) and the state of the run (`status.json`).

The lock is the kernel's (flock): it ends with the process that holds it, so a killed trainer leaves no lock behind. It
works between hosts if the file system forwards it: NFS (Linux), Lustre mounted with `flock`, GPFS, CephFS. There it
ends when the server finds that the host is dead. If flock is not supported, the run continues without a lock and
prints a warning.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from maelstream.jobs.distributed.errors import AgreedError
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.shards.durable import atomic_write

if TYPE_CHECKING:
    from maelstream.jobs.distributed.ranks import ControlGroup

_TAKE_OVER_S = 5.0  # ranks of a start that was just killed may hold the lock for a moment
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class LockedError(AgreedError):
    """Another process trains the run."""


@dataclass(frozen=True)
class Status:
    """The contents of `status.json`."""

    state: Literal["running", "finished", "stopped", "failed"]
    step: int
    total_steps: int
    ranks: int
    why: str = ""
    """Reason for `stopped` and `failed`."""
    host: str = socket.gethostname()
    process: int = os.getpid()
    updated: float = 0.0
    """Seconds since 1970."""

    def write(self, path: Path) -> None:
        with atomic_write(path) as file:
            file.write(json.dumps(asdict(self) | {"process": os.getpid(), "updated": time.time()}).encode())


def read_status(path: Path) -> Status | None:
    """The contents of `status.json`; None if the run has not written it yet."""
    return Status(**json.loads(path.read_text())) if path.exists() else None


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock now, as far as this host can see."""
    if not path.exists():
        return False
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


def state_of(folder: RunFolder) -> str:
    """`not begun`, `running`, `finished`, `stopped: why`, `failed: why` or `died`.

    A run has died if its status is still `running` but no process holds its lock.
    """
    status = read_status(folder.status)
    if status is None:
        return "not begun"
    if status.state == "running" and not is_locked(folder.lock):
        return "died"
    return f"{status.state}: {status.why}" if status.why else status.state


@contextmanager
def locked(path: Path, control_group: "ControlGroup") -> Iterator[None]:
    """Holds the lock while the block runs; rank 0 takes it for all ranks.

    Raises:
        LockedError: another process holds it.
    """
    file = None
    conflict = ""
    if control_group.ranks.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
        conflict = _take(path, file.fileno())
        if not conflict:
            file.truncate(0)
            file.write(f"host {socket.gethostname()}, process {os.getpid()}, since {time.strftime('%F %T')}")
            file.flush()
    try:
        if conflict := control_group.text_of_first(conflict):
            raise LockedError(conflict)
        yield
    finally:
        if file is not None:
            file.close()


def _take(path: Path, descriptor: int) -> str:
    """Takes the lock; returns "", or the reason why it cannot be taken."""
    until = time.monotonic() + _TAKE_OVER_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return ""
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                print(f"{path} cannot be locked ({error.strerror}); make sure that no other process trains this run")
                return ""
            if time.monotonic() > until:
                return (
                    f"{path.parent} is being trained already ({path.read_text()}); wait for it, stop it, or give "
                    "another --run"
                )
        time.sleep(0.2)
