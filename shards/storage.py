"""Folders of sources and datasets: a local path, or any URI that `pyarrow.fs` opens (`s3://`, `gs://`).

Writes are atomic: a local file is renamed when it is complete, and a store's object appears when its upload ends.
Every request to a store has a time limit and is tried again (`shards/retry.py`).
"""

import hashlib
import io
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import pyarrow as pa
from pyarrow import fs

from maelstream.shards.durable import atomic_write
from maelstream.shards.errors import DatasetError, StorageError
from maelstream.shards.retry import connect_timeout_s, read_timeout_s, read_with_retries, within

WORK = ".pack"
"""Work folder of a build inside its dataset; deleted when the dataset is complete."""
_CHUNK_BYTES = 2**22
_REQUEST_BYTES = 2**24  # of one read from a store
_SLOW_BYTES_PER_S = 2**18  # a request that delivers less is as good as stuck
_LISTING_READS = 9  # a listing has a request per 1,000 names, and may take this many read time-outs

T = TypeVar("T")


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
        """The folder at a path or URI; it need not exist. DatasetError if no file system supports it."""
        text = str(where)
        if not is_utf8(text):
            raise DatasetError(f"{text!a}: the path is not UTF-8; rename the folder")
        if "://" not in text:
            return cls(fs.LocalFileSystem(), os.path.abspath(text), text.rstrip("/") or text)
        scheme = text.partition("://")[0]
        limit_s = connect_timeout_s() + read_timeout_s()
        try:
            filesystem, path = within(limit_s, lambda: fs.FileSystem.from_uri(_with_retry_limit(text)))
        except (OSError, ValueError, ImportError) as error:
            raise DatasetError(f"{scheme}://...: no file system supports this URI ({_reason(error)})") from None
        path = path.rstrip("/")
        return cls(_with_timeouts(filesystem), path, path if scheme == "file" else f"{scheme}://{path}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.filesystem, self.path, self.shown)

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
        return self._call("", "be reached", "", lambda: self.filesystem.get_file_info(self.path).type)

    def entries(self, folder: str = "", skip: Callable[[str], bool] = lambda name: False) -> list[Entry]:
        """Files and folders directly in `folder`, sorted by name; empty if `folder` does not exist.

        Names for which `skip` is true are left out. DatasetError for other entries that cannot be a source: a broken
        link, a device, a name that is not UTF-8.
        """
        where, shown = (f"{root}/{folder}".rstrip("/") for root in (self.path, self.shown))
        if self.local:  # pyarrow skips broken links
            with _dataset_errors(shown, "be listed"):
                return sorted(_local_entries(where, shown, skip))
        selector = fs.FileSelector(where, allow_not_found=True)
        infos = self._call(
            folder, "be listed", "", lambda: self.filesystem.get_file_info(selector), _LISTING_READS * read_timeout_s()
        )
        return sorted(Entry(info.base_name, info.is_file, info.size or 0) for info in infos if not skip(info.base_name))

    def names(self, folder: str = "") -> set[str]:
        """File names directly in `folder`."""
        return {entry.name for entry in self.entries(folder) if entry.is_file}

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        folder, _, file = name.rpartition("/")
        return file in self.names(folder)

    def open(self, name: str) -> "pa.NativeFile | RemoteFile":
        """Opens a file for random access: `size()`, and `read_at(size, offset)` from any thread.

        Raises:
            DatasetError: it cannot be opened.
        """
        file = self._call(name, "be read", "", lambda: self.filesystem.open_input_file(f"{self.path}/{name}"))
        if self.local:
            return file
        return RemoteFile(
            file.size(),
            lambda size, offset: self._call(
                name, "be read", "", lambda: file.read_at(size, offset), _request_limit_s(size)
            ),
        )

    def _call(self, name: str, what: str, then: str, call: Callable[[], T], limit_s: float | None = None) -> T:
        """Result of a call to the file system; a store's is limited in time and tried again."""
        shown = f"{self.shown}/{name}".rstrip("/")

        def attempt() -> T:
            with _dataset_errors(shown, what, then):
                return call() if self.local else within(limit_s or _request_limit_s(0), call)

        return attempt() if self.local else read_with_retries(attempt)

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
        then = "; all finished files are kept"
        with tempfile.TemporaryFile() as file:
            with _dataset_errors(f"{self.shown}/{name}", "be written", then):
                yield file
                file.flush()
            size = file.tell()
            self._call(name, "be written", then, lambda: self._upload(file, size, name), _request_limit_s(size))

    def _upload(self, file: BinaryIO, size: int, name: str) -> None:
        # By position: the thread of an attempt that was given up may still read.
        with self.filesystem.open_output_stream(f"{self.path}/{name}") as upload:
            for offset in range(0, size, _CHUNK_BYTES):
                upload.write(os.pread(file.fileno(), min(_CHUNK_BYTES, size - offset), offset))
        stored = self.filesystem.get_file_info(f"{self.path}/{name}").size
        if stored != size:
            raise OSError(f"{stored} of {size} bytes arrived")

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A temporary local folder. Its files can be large, so it is on the same disk if this folder is local.

        Raises:
            DatasetError: the block raises OSError, such as on a full disk.
        """
        where = f"{self.path}/{WORK}" if self.local else None
        shown = where or tempfile.gettempdir()
        with (
            _dataset_errors(shown, "be written", "; all finished files are kept"),
            tempfile.TemporaryDirectory(dir=where) as folder,
        ):
            yield Path(folder)

    def remove_work(self) -> None:
        """Deletes the build's work folder, if it exists."""
        if self.local:
            shutil.rmtree(f"{self.path}/{WORK}", ignore_errors=True)  # another part may be deleting it at the same time
        elif self.entries(WORK):
            with _dataset_errors(f"{self.shown}/{WORK}", "be removed"), suppress(FileNotFoundError):
                # Google's store has no object for the folder: it raises FileNotFoundError after it deleted the files.
                self.filesystem.delete_dir(f"{self.path}/{WORK}")


class RemoteFile(io.RawIOBase):
    """A file of a store, for reading at any position. Each request has a time limit and is tried again."""

    def __init__(self, size: int, read_at: Callable[[int, int], bytes]):
        """`size` in bytes; `read_at` takes how many bytes to read and where."""
        self._size, self._read_at, self._position = size, read_at, 0

    def size(self) -> int:
        """Bytes."""
        return self._size

    def read_at(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes from `offset`. DatasetError if they cannot be read."""
        end = min(offset + size, self._size)
        parts = [self._read_at(min(_REQUEST_BYTES, end - start), start) for start in range(offset, end, _REQUEST_BYTES)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read(self, size: int | None = -1) -> bytes:
        """The next `size` bytes, or all that follow."""
        rest = max(0, self._size - self._position)
        data = self.read_at(rest if size is None or size < 0 else size, self._position)
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer` and returns the number of bytes."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a position and returns it."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        """The position of the next `read`."""
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _request_limit_s(size: int) -> float:
    """Seconds that a request of `size` bytes may take."""
    return connect_timeout_s() + read_timeout_s() + size / _SLOW_BYTES_PER_S


def _with_retry_limit(uri: str) -> str:
    """`uri`, with a time limit for the retries of Google's client, which are silent and take 15 minutes without one."""
    if not uri.startswith(("gs://", "gcs://")) or "retry_limit_seconds" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={math.ceil(read_timeout_s())}"


def _with_timeouts(filesystem: fs.FileSystem) -> fs.FileSystem:
    """The same S3 store with our time-outs and no silent retries; a URI cannot set these."""
    if not isinstance(filesystem, fs.S3FileSystem):
        return filesystem
    options = filesystem.__reduce__()[1][0] | {
        "connect_timeout": connect_timeout_s(),
        "request_timeout": read_timeout_s(),
        "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=1),
    }
    return fs.S3FileSystem(**options)


def _unpickled(filesystem: fs.FileSystem, path: str, shown: str) -> Storage:
    return Storage(_with_timeouts(filesystem), path, shown)  # pickling a store loses its retry strategy


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


_REFUSED = re.compile(
    r"AWS Error (ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_\w+|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT)"
    r"|HTTP status 4(?!08|29)\d\d|google::cloud::Status\((NOT_FOUND|PERMISSION_DENIED|UNAUTHENTICATED)"
)
"""Answers of a store that another attempt would not change."""


@contextmanager
def _dataset_errors(path: str, what: str, then: str = "") -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DatasetError(f"{path} cannot {what} ({_reason(error)}){then}") from None
    except OSError as error:
        kind = DatasetError if _REFUSED.search(str(error)) else StorageError
        raise kind(f"{path} cannot {what} ({_reason(error)}){then}") from None


def _reason(error: Exception) -> str:
    """The cause of an error on one line; pyarrow writes it after the path and an error number."""
    text = getattr(error, "strerror", None) or str(error)
    return re.sub(r"^.*(Detail: \[errno \d+\]|; Details:) ", "", " ".join(text.split()))
