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

from pydantic import TypeAdapter

from maelstream.jobs.checkpointing.store import put_aside
from maelstream.jobs.distributed.errors import AgreedError
from maelstream.jobs.run_folder.environment import MAX_TIME
from maelstream.jobs.run_folder.folder import RunFolder, is_count
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
    """The contents of `status.json`; None if the run has not written it yet, or if it is damaged."""
    if not path.is_file():
        return None
    try:
        status = TypeAdapter(Status).validate_json(path.read_bytes())
    except ValueError:
        return None
    counts = (status.step, status.total_steps, status.ranks)
    return status if all(map(is_count, counts)) and 0 <= status.updated < MAX_TIME else None


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock now, as far as this host and user can see."""
    if not path.is_file():
        return False
    try:
        file = path.open("rb")
    except PermissionError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # NFS grants LOCK_EX only to files open for writing
        except OSError:
            return True
        return False


def state_of(folder: RunFolder) -> str:
    """`not begun`, `running`, `finished`, `stopped: why`, `failed: why`, `died` or `unknown`.

    A run has died if its status is still `running` but no process holds its lock. It is unknown if `status.json` is
    damaged and no process holds the lock.
    """
    status = read_status(folder.status)
    if status is None:
        begun = folder.status.exists()
        return "not begun" if not begun else "running" if is_locked(folder.lock) else "unknown"
    if status.state == "running" and not is_locked(folder.lock):
        return "died"
    return f"{status.state}: {status.why}" if status.why else status.state


@contextmanager
def locked(path: Path, control_group: "ControlGroup") -> Iterator[None]:
    """Holds the lock while the block runs; rank 0 takes it for all ranks.

    Raises:
        LockedError: another process holds it, or the run's folder cannot be written.
    """
    file = None
    conflict = ""
    if control_group.ranks.rank == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():  # a lock is a file, so no process holds this
                put_aside(path)
            file = path.open("a+")
            conflict = _take(path, file.fileno())
            if not conflict:
                file.truncate(0)
                file.write(f"host {socket.gethostname()}, process {os.getpid()}, since {time.strftime('%F %T')}")
                file.flush()
        except OSError as error:
            conflict = (
                f"{error.filename or path} cannot be written ({error.strerror}); give a folder that you may write to "
                "with --run"
            )
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
                holder = path.read_text(errors="replace")[:200]
                return f"{path.parent} is being trained already ({holder}); wait for it, stop it, or give another --run"
        time.sleep(0.2)
