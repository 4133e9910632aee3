"""Folders of sources and datasets: a local path, or any URI that `pyarrow.fs` opens (`s3://`, `gs://`).

Writes are atomic: a local file is renamed when it is complete, and a store's object appears when its upload ends.
"""

import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa
from pyarrow import fs

from maelstream.shards.durable import atomic_write
from maelstream.shards.errors import DatasetError, StorageError

WORK = ".pack"
"""Work folder of a build inside its dataset; deleted when the dataset is complete."""
_CHUNK_BYTES = 2**22


class Entry(NamedTuple):
    """A file or folder inside a folder."""

    name: str
    is_file: bool
    """False for a folder."""
    size: int
    """Bytes, for a file."""


@dataclass(frozen=True)
class Storage:
    """A folder of files. Names are relative to it, with forward slashes."""

    filesystem: fs.FileSystem
    path: str
    """Absolute path in `filesystem`."""
    shown: str
    """Path or URI as the user wrote it, without credentials; for messages."""

    @classmethod
    def at(cls, where: str | Path) -> "Storage":
        """The folder at a path or URI; it need not exist. DatasetError if no file system supports the URI."""
        text = str(where)
        if "://" not in text:
            return cls(fs.LocalFileSystem(), os.path.abspath(text), text.rstrip("/") or text)
        scheme = text.partition("://")[0]
        try:
            filesystem, path = fs.FileSystem.from_uri(text)
        except (OSError, ValueError, ImportError) as error:
            raise DatasetError(f"{scheme}://...: no file system supports this URI ({_reason(error)})") from None
        path = path.rstrip("/")
        return cls(filesystem, path, path if scheme == "file" else f"{scheme}://{path}")

    def __str__(self) -> str:
        return self.shown

    @property
    def local(self) -> bool:
        """Whether the folder is on a local file system."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def inside(self, name: str) -> "Storage":
        """A folder below this one."""
        return Storage(self.filesystem, f"{self.path}/{name}", f"{self.shown}/{name}")

    @property
    def parent(self) -> "Storage":
        """The folder that contains this one."""
        return Storage(self.filesystem, os.path.dirname(self.path), os.path.dirname(self.shown) or ".")

    @property
    def name(self) -> str:
        """Last part of the path."""
        return os.path.basename(self.path)

    def kind(self) -> fs.FileType:
        """Whether the path is a folder, a file or nothing."""
        with _dataset_errors(self.shown, "be reached"):
            return self.filesystem.get_file_info(self.path).type

    def entries(self, folder: str = "", skip: Callable[[str], bool] = lambda name: False) -> list[Entry]:
        """Files and folders directly in `folder`, sorted by name; empty if `folder` does not exist.

        Names for which `skip` is true are left out. DatasetError for other entries that cannot be a source: a broken
        link, a device, a name that is not UTF-8.
        """
        where, shown = (f"{root}/{folder}".rstrip("/") for root in (self.path, self.shown))
        with _dataset_errors(shown, "be listed"):
            if self.local:  # pyarrow skips broken links
                found = _local_entries(where, shown, skip)
            else:
                infos = self.filesystem.get_file_info(fs.FileSelector(where, allow_not_found=True))
                found = [
                    Entry(info.base_name, info.is_file, info.size or 0) for info in infos if not skip(info.base_name)
                ]
        return sorted(found)

    def names(self, folder: str = "") -> set[str]:
        """File names directly in `folder`."""
        return {entry.name for entry in self.entries(folder) if entry.is_file}

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        folder, _, file = name.rpartition("/")
        return file in self.names(folder)

    def open(self, name: str) -> pa.NativeFile:
        """Opens a file for random access: `size()`, and `read_at(size, offset)` from any thread.

        Raises:
            DatasetError: it cannot be opened.
        """
        with self.dataset_errors(name):
            return self.filesystem.open_input_file(f"{self.path}/{name}")

    def dataset_errors(self, name: str) -> AbstractContextManager[None]:
        """A context that turns a failure to read file `name` into a DatasetError."""
        return _dataset_errors(f"{self.shown}/{name}", "be read")

    def read(self, name: str) -> bytes:
        """All bytes of a file. DatasetError if it cannot be read."""
        with self.open(name) as file, self.dataset_errors(name):
            return file.read()

    def sha256(self, name: str) -> str:
        """SHA-256 of a file, read in chunks. DatasetError if it cannot be read."""
        digest = hashlib.sha256()
        with self.open(name) as file, self.dataset_errors(name):
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def make(self) -> None:
        """Creates this folder and its work folder; a store needs no folders. DatasetError on failure."""
        if self.local:
            with _dataset_errors(self.shown, "be created", "; choose another folder"):
                self.filesystem.create_dir(f"{self.path}/{WORK}", recursive=True)

    @contextmanager
    def atomic_write(self, name: str) -> Iterator[BinaryIO]:
        """A file to write that appears as `name` at the end of the block. DatasetError if it cannot be written.

        A remote file is written to the local disk first, so the block may seek, and a partial file is never uploaded.
        """
        if self.local:
            with atomic_write(Path(self.path, name), temporary_folder=Path(self.path, WORK)) as file:
                yield file
            return
        with _dataset_errors(f"{self.shown}/{name}", "be written", "; all finished files are kept"):
            with tempfile.TemporaryFile() as file:
                yield file
                size = file.tell()
                file.seek(0)
                with self.filesystem.open_output_stream(f"{self.path}/{name}") as upload:
                    while chunk := file.read(_CHUNK_BYTES):
                        upload.write(chunk)
            stored = self.filesystem.get_file_info(f"{self.path}/{name}").size
            if stored != size:
                raise OSError(f"{stored} of {size} bytes arrived")

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A temporary local folder. Its files can be large, so it is on the same disk if this folder is local."""
        with tempfile.TemporaryDirectory(dir=f"{self.path}/{WORK}" if self.local else None) as folder:
            yield Path(folder)

    def remove_work(self) -> None:
        """Deletes the build's work folder, if it exists."""
        if self.local:
            shutil.rmtree(f"{self.path}/{WORK}", ignore_errors=True)  # another part may be deleting it at the same time
        elif self.entries(WORK):
            with _dataset_errors(f"{self.shown}/{WORK}", "be removed"), suppress(FileNotFoundError):
                # Google's store has no object for the folder: it raises FileNotFoundError after it deleted the files.
                self.filesystem.delete_dir(f"{self.path}/{WORK}")


def is_utf8(name: str) -> bool:
    """Whether a name is UTF-8. Python turns other bytes into surrogates, which an index cannot hold."""
    return not any("\udc80" <= letter <= "\udcff" for letter in name)


def _local_entries(where: str, shown: str, skip: Callable[[str], bool]) -> list[Entry]:
    found = []
    for item in os.scandir(where) if os.path.isdir(where) else ():
        if skip(item.name):
            continue
        path = f"{shown}/{item.name}"
        if not is_utf8(item.name):
            raise DatasetError(f"{path!a}: the name is not UTF-8; rename it")
        with _dataset_errors(path, "be read", "; make it readable or remove it"):
            try:
                status = item.stat()
            except FileNotFoundError:
                if item.is_symlink():  # a broken link
                    raise
                continue  # another part of the build has renamed it since it was listed
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise DatasetError(f"{path} is neither a file nor a folder; remove it")
        found.append(Entry(item.name, stat.S_ISREG(status.st_mode), status.st_size))
    return found


@contextmanager
def _dataset_errors(path: str, what: str, then: str = "") -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DatasetError(f"{path} cannot {what} ({_reason(error)}){then}") from None
    except OSError as error:
        raise StorageError(f"{path} cannot {what} ({_reason(error)}){then}") from None


def _reason(error: Exception) -> str:
    """The cause of an error on one line; pyarrow writes it after the path and an error number."""
    text = getattr(error, "strerror", None) or str(error)
    return re.sub(r"^.*Detail: \[errno \d+\] ", "", " ".join(text.split()))
