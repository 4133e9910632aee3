"""Who carries a run out now (`run.lock`) and how it stands (`status.json`).

The lock is the kernel's (flock): it ends with the process that holds it, however that ends, so a lock left behind by
a dead trainer is no lock. Between hosts it holds where the file system passes it on: NFS (Linux), Lustre mounted with
`flock`, GPFS, CephFS; there it ends when the server finds the host dead. Where flock is not supported the run goes on
without a lock, and says so.
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
from typing import Literal

from maelstream.jobs.distributed.ranks import AgreedError, ControlGroup
from maelstream.shards.durable import written_whole

_TAKE_OVER_S = 5.0  # ranks of a start that was just killed may live a moment longer
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class LockedError(AgreedError):
    """Another trainer carries the run out."""


@dataclass(frozen=True)
class Status:
    """What `status.json` holds."""

    state: Literal["running", "finished", "stopped", "failed"]
    step: int
    total_steps: int
    ranks: int
    why: str = ""
    """For `stopped` and `failed`."""
    host: str = socket.gethostname()
    process: int = os.getpid()
    updated: float = 0.0
    """Seconds since 1970."""

    def write(self, path: Path) -> None:
        with written_whole(path) as file:
            file.write(json.dumps(asdict(self) | {"process": os.getpid(), "updated": time.time()}).encode())


def read_status(path: Path) -> Status | None:
    """None for a run that wrote none yet."""
    return Status(**json.loads(path.read_text())) if path.exists() else None


def is_locked(path: Path) -> bool:
    """Whether a trainer holds the lock now, as far as this host can see."""
    if not path.exists():
        return False
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


@contextmanager
def locked(path: Path, control_group: ControlGroup) -> Iterator[None]:
    """Holds the lock while the block runs; rank 0 takes it for all. LockedError when another trainer has it."""
    file = None
    refusal = ""
    if control_group.ranks.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
        refusal = _take(path, file.fileno())
        if not refusal:
            file.truncate(0)
            file.write(f"host {socket.gethostname()}, process {os.getpid()}, since {time.strftime('%F %T')}")
            file.flush()
    try:
        if refusal := control_group.text_of_first(refusal):
            raise LockedError(refusal)
        yield
    finally:
        if file is not None:
            file.close()


def _take(path: Path, descriptor: int) -> str:
    """Why the lock cannot be had, "" when it can."""
    until = time.monotonic() + _TAKE_OVER_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return ""
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                print(f"{path} cannot be locked here ({error.strerror}); see to it that nobody else trains this run")
                return ""
            if time.monotonic() > until:
                return (
                    f"{path.parent} is being trained already ({path.read_text()}); wait for it, stop it, or give "
                    "another --run"
                )
        time.sleep(0.2)
