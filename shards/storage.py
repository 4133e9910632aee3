"""Where sources and datasets lie: a local folder, or any URI that `pyarrow.fs` opens (`s3://`, `gs://`).

A local file is whole or absent because it is renamed into place; an object of a store because it appears when its
upload is complete.
"""

import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa
from pyarrow import fs

from maelstream.shards.durable import written_whole
from maelstream.shards.errors import DatasetError, StorageError

WORK = ".pack"
"""Folder of a build inside its dataset; gone when the dataset is whole."""
_CHUNK_BYTES = 2**22


class Entry(NamedTuple):
    """What lies in a folder."""

    name: str
    is_file: bool
    """Or else a folder."""
    size: int
    """Bytes, of a file."""


@dataclass(frozen=True)
class Storage:
    """A folder of files. Names are relative to it, with forward slashes."""

    filesystem: fs.FileSystem
    path: str
    """As the file system takes it; absolute."""
    shown: str
    """As the user wrote it, without credentials."""

    @classmethod
    def at(cls, where: str | Path) -> "Storage":
        """The folder that a path or URI names; it need not exist. DatasetError when no file system knows the URI."""
        text = str(where)
        if "://" not in text:
            return cls(fs.LocalFileSystem(), os.path.abspath(text), text.rstrip("/") or text)
        scheme = text.partition("://")[0]
        try:
            filesystem, path = fs.FileSystem.from_uri(text)
        except (OSError, ValueError, ImportError) as error:
            raise DatasetError(f"{scheme}://...: no file system takes this URI ({_reason(error)})") from None
        path = path.rstrip("/")
        return cls(filesystem, path, path if scheme == "file" else f"{scheme}://{path}")

    def __str__(self) -> str:
        return self.shown

    @property
    def local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def inside(self, name: str) -> "Storage":
        """A folder below this one."""
        return Storage(self.filesystem, f"{self.path}/{name}", f"{self.shown}/{name}")

    @property
    def parent(self) -> "Storage":
        return Storage(self.filesystem, os.path.dirname(self.path), os.path.dirname(self.shown) or ".")

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    def kind(self) -> fs.FileType:
        """Whether this is a folder, a file or nothing."""
        with _explained(self.shown, "be reached"):
            return self.filesystem.get_file_info(self.path).type

    def entries(self, folder: str = "") -> list[Entry]:
        """What lies directly in `folder`, by name; empty where there is none.

        DatasetError for what can be no source: a link to nowhere, a device, a name that is not UTF-8.
        """
        where, shown = (f"{root}/{folder}".rstrip("/") for root in (self.path, self.shown))
        with _explained(shown, "be listed"):
            if self.local:  # pyarrow passes over links to nowhere
                found = _local_entries(where, shown)
            else:
                infos = self.filesystem.get_file_info(fs.FileSelector(where, allow_not_found=True))
                found = [Entry(info.base_name, info.is_file, info.size or 0) for info in infos]
        return sorted(found)

    def names(self, folder: str = "") -> set[str]:
        """File names directly in `folder`."""
        return {entry.name for entry in self.entries(folder) if entry.is_file}

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        folder, _, file = name.rpartition("/")
        return file in self.names(folder)

    def open(self, name: str) -> pa.NativeFile:
        """A file for random access: `size()`, and `read_at(size, offset)` from any thread. DatasetError if it fails."""
        with self.explained(name):
            return self.filesystem.open_input_file(f"{self.path}/{name}")

    def explained(self, name: str) -> AbstractContextManager[None]:
        """While it is entered, a failure to read file `name` is a DatasetError that says so."""
        return _explained(f"{self.shown}/{name}", "be read")

    def read(self, name: str) -> bytes:
        """All bytes of a file. DatasetError when it cannot be read."""
        with self.open(name) as file, self.explained(name):
            return file.read()

    def sha256(self, name: str) -> str:
        """SHA-256 of a file, read in pieces. DatasetError when it cannot be read."""
        digest = hashlib.sha256()
        with self.open(name) as file, self.explained(name):
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def make(self) -> None:
        """Makes this folder and the one for a build's work; a store's objects need none. DatasetError if it fails."""
        if self.local:
            with _explained(self.shown, "be made", "; choose another folder"):
                self.filesystem.create_dir(f"{self.path}/{WORK}", recursive=True)

    @contextmanager
    def written_whole(self, name: str) -> Iterator[BinaryIO]:
        """A file that becomes `name` when the block ends well, and not before. DatasetError when it cannot be written.

        A remote one is written to the local disk first, so that the block may seek and nothing half is ever uploaded.
        """
        if self.local:
            with written_whole(Path(self.path, name), aside_in=Path(self.path, WORK)) as file:
                yield file
            return
        with _explained(f"{self.shown}/{name}", "be written", "; what was finished before it is kept"):
            with tempfile.TemporaryFile() as file:
                yield file
                size = file.tell()
                file.seek(0)
                with self.filesystem.open_output_stream(f"{self.path}/{name}") as upload:
                    while chunk := file.read(_CHUNK_BYTES):
                        upload.write(chunk)
            held = self.filesystem.get_file_info(f"{self.path}/{name}").size
            if held != size:
                raise OSError(f"{held} of {size} bytes arrived")

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A local folder for what need not be kept: on the same disk where this is local, as it may be large."""
        with tempfile.TemporaryDirectory(dir=f"{self.path}/{WORK}" if self.local else None) as folder:
            yield Path(folder)

    def remove_work(self) -> None:
        """Deletes the folder of the build's work, if it is there."""
        if self.local:
            shutil.rmtree(f"{self.path}/{WORK}", ignore_errors=True)  # another finisher may be deleting it, too
        elif self.entries(WORK):
            with _explained(f"{self.shown}/{WORK}", "be removed"), suppress(FileNotFoundError):
                # Google's store has no object for the folder itself, and says so after the files are gone
                self.filesystem.delete_dir(f"{self.path}/{WORK}")


def is_text(name: str) -> bool:
    """Whether a name was UTF-8; Python keeps bytes that were not as surrogates, which no index takes."""
    return not any("\udc80" <= letter <= "\udcff" for letter in name)


def _local_entries(where: str, shown: str) -> list[Entry]:
    found = []
    for item in os.scandir(where) if os.path.isdir(where) else ():
        path = f"{shown}/{item.name}"
        if not is_text(item.name):
            raise DatasetError(f"{path!a}: the name is not UTF-8; rename it")
        with _explained(path, "be read", "; make it readable or remove it"):
            try:
                status = item.stat()
            except FileNotFoundError:
                if item.is_symlink():  # to nowhere
                    raise
                continue  # gone since it was listed: another part of the build has renamed it
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise DatasetError(f"{path} is neither a file nor a folder; remove it")
        found.append(Entry(item.name, stat.S_ISREG(status.st_mode), status.st_size))
    return found


@contextmanager
def _explained(path: str, what: str, then: str = "") -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DatasetError(f"{path} cannot {what} ({_reason(error)}){then}") from None
    except OSError as error:
        raise StorageError(f"{path} cannot {what} ({_reason(error)}){then}") from None


def _reason(error: Exception) -> str:
    """The part of an error that a reader wants, on one line; pyarrow puts the cause behind the path and a number."""
    text = getattr(error, "strerror", None) or str(error)
    return re.sub(r"^.*Detail: \[errno \d+\] ", "", " ".join(text.split()))
