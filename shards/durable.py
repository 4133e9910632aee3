"""Files that are whole or absent: written under another name, synced to the disk, then renamed."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from maelstream.shards.errors import DatasetError


@contextmanager
def written_whole(path: Path, aside_in: Path | None = None) -> Iterator[BinaryIO]:
    """A file that becomes `path` when the block ends well; DatasetError when the disk does not take it.

    Until then it lies in `aside_in`, a folder of the same file system; the folder of `path` if not given.
    """
    # Not the process's number: two hosts that share the folder may have the same.
    aside = (aside_in or path.parent) / f".{path.name}.{secrets.token_hex(4)}.writing"
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
        sync(path.parent)
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be written ({error.strerror}); what was finished before it is kept"
        ) from None
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Puts a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
