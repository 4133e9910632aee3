"""Atomic writes: a file is complete or absent. It is written under another name, synced to disk, then renamed."""

import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from maelstream.shards.errors import DatasetError


@contextmanager
def atomic_write(path: Path, temporary_folder: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write that is renamed to `path` at the end of the block; DatasetError if it cannot be written.

    Until then it is in `temporary_folder`, which is on the same file system; default: the folder of `path`. If the
    block raises, the file is deleted and `path` does not change.
    """
    # A random name, not the process id: two hosts that share the folder may have the same id.
    # A file name has at most 255 bytes.
    start = path.name.encode()[:200].decode(errors="ignore")
    temporary = (temporary_folder or path.parent) / f".{start}.{secrets.token_hex(4)}.writing"
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync(path.parent)
    except OSError as error:
        raise DatasetError(f"{path} cannot be written ({error.strerror}); all finished files are kept") from None
    finally:
        temporary.unlink(missing_ok=True)


def can_write(folder: Path) -> bool:
    """Whether this user may create files in `folder`, or, if there is no such folder, may create it."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def sync(path: Path) -> None:
    """Syncs a file, or the names in a folder, to disk.

    Some file systems cannot sync folders (CIFS, sshfs, some other FUSE): that is reported once, and ignored.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        _report_unsynced(path)
    finally:
        os.close(descriptor)


def _report_unsynced(path: Path) -> None:
    device = os.stat(path).st_dev
    if device not in _reported:
        _reported.add(device)
        print(
            f"{path}: its file system cannot sync folders, so a power loss may undo the renaming of the newest files",
            file=sys.stderr,
        )


_reported: set[int] = set()  # devices
