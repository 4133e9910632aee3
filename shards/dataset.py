"""An opened dataset: the manifest, checked when it is opened, and the columns of the index."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from pyarrow.fs import FileType

from maelstream.shards.errors import DatasetError, StorageError
from maelstream.shards.index import INDEX_NAME, Column, Read, TextColumn, open_columns
from maelstream.shards.retry import read_with_retries
from maelstream.shards.storage import WORK, Storage

FORMAT_VERSION = 1
MANIFEST_NAME, INFO_NAME, QUARANTINE_NAME = "dataset.json", "_info.json", "quarantine.jsonl"
_HASHED_BYTES = 2**27  # A local index up to this size (ImageNet's has 110 MB) is compared with its SHA-256 when opened.
_MAX_SIDE = 2**24  # pixels; no format that pack accepts has longer sides


def with_checksum(manifest: dict[str, Any]) -> dict[str, Any]:
    """`manifest` with a `checksum` of all its other fields."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return rest | {"checksum": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def read_manifest(storage: Storage) -> dict[str, Any] | None:
    """The manifest of the dataset in a folder; None if there is none, or if `dataset.json` is another program's.

    Raises:
        DatasetError: it is not JSON.
    """
    if storage.kind() != FileType.Directory or MANIFEST_NAME not in storage.names():
        return None
    try:
        manifest = json.loads(storage.read(MANIFEST_NAME))
        json.dumps(manifest, ensure_ascii=False).encode()  # half of a surrogate pair can be neither printed nor stored
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DatasetError(f"{storage}/{MANIFEST_NAME} is damaged ({reason}); pack the dataset again") from None
    ours = isinstance(manifest, dict) and isinstance(manifest.get("format_version"), int) and "plan" in manifest
    return manifest if ours else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not {"/", "\0"} & set(value)


def _is_shard(value: object) -> bool:
    return (
        isinstance(value, dict)
        and _is_file_name(value.get("name"))
        and _is_count(value.get("samples"))
        and _is_count(value.get("bytes"))
        and _is_text(value.get("sha256"))
    )


_MANIFEST_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_is_text, "a text"),
    "split": (_is_text, "a text"),
    "samples": (lambda value: _is_count(value) and value > 0, "a number of samples from 1 on"),
    "quarantined": (_is_count, "a number of files"),
    "formats": (
        lambda value: isinstance(value, dict) and all(map(_is_count, value.values())),
        "numbers of samples by format",
    ),
    "classes": (lambda value: isinstance(value, list) and all(map(_is_text, value)), "a list of class names"),
    "shards": (
        lambda value: isinstance(value, list) and bool(value) and all(map(_is_shard, value)),
        "a list of shards with name, samples, bytes and sha256",
    ),
    "adopted": (lambda value: isinstance(value, bool), "true or false"),
    "options": (
        lambda value: isinstance(value, dict) and (value.get("resize") is None or _is_count(value["resize"])),
        "the options of pack",
    ),
    "side_files": (
        lambda value: isinstance(value, dict) and all(_is_file_name(k) and _is_text(v) for k, v in value.items()),
        "SHA-256 by file name",
    ),
}


def _check_manifest(manifest: dict[str, Any], path: str) -> None:
    """Raises a DatasetError for a field that is missing or has a value of another kind."""
    for field, (is_valid, what) in _MANIFEST_FIELDS.items():
        if field not in manifest or not is_valid(manifest[field]):
            found = f"is {str(manifest[field])[:60]!r}" if field in manifest else "is missing"
            raise DatasetError(f"{path} is damaged: {field} {found}, not {what}; restore it or pack the dataset again")


def _what_is_there(storage: Storage) -> str:
    """Why a folder is no packed dataset, and what to do."""
    entries = storage.entries() if storage.kind() == FileType.Directory else []
    names = {entry.name for entry in entries}
    if not names:
        return f"no {MANIFEST_NAME}; missing); `maelstream pack SRC {storage}` makes one"
    if MANIFEST_NAME in names:
        why = f"its {MANIFEST_NAME} is another program's"
    elif {WORK, INDEX_NAME} & names:
        return f"no {MANIFEST_NAME}; its packing was not finished: run the same `maelstream pack` or `index` again)"
    else:
        why = f"no {MANIFEST_NAME}"
    if any(name.endswith(".tar") for name in names):
        return f"{why}); `maelstream index {storage}` makes one of its tar shards"
    return f"{why}); `maelstream pack {storage} DST` makes one of its images"


class Dataset:
    """A packed dataset. Each column has one number per sample; `column[samples]` gives rows as a numpy array:

    `shard`, `size`, `width`, `height`, `crc32c` uint32; `offset` uint64; `label` int32 (-1 without labels).
    """

    shard: Column
    offset: Column
    size: Column
    width: Column
    height: Column
    label: Column
    crc32c: Column

    def __init__(
        self,
        storage: Storage,
        manifest: dict[str, Any],
        fingerprint: str,
        numbers: dict[str, Column],
        texts: dict[str, TextColumn],
    ):
        """`numbers` and `texts` are the columns of the index by name. Users call `Dataset.open` instead."""
        self.storage, self.manifest, self.fingerprint, self._texts = storage, manifest, fingerprint, texts
        for name, column in numbers.items():
            setattr(self, name, column)

    @classmethod
    def open(cls, folder: str | Path) -> "Dataset":
        """Opens a dataset that `maelstream pack` or `maelstream index` wrote.

        A local one opens in O(1), after the SHA-256 of an index of up to 128 MiB. For a remote one, the numbers of the
        index are fetched: 32 bytes per sample.

        Raises:
            DatasetError: the dataset is missing, unfinished, damaged or newer, or index and manifest differ.
        """
        return cls.open_storage(Storage.at(folder))

    @classmethod
    def open_storage(cls, storage: Storage, hashed_bytes: int = _HASHED_BYTES) -> "Dataset":
        """As `open`, for a folder given as `Storage`. A larger index than `hashed_bytes` is not hashed."""
        path = f"{storage}/{MANIFEST_NAME}"
        manifest = read_manifest(storage)
        if manifest is None:
            raise DatasetError(f"{storage} is not a packed dataset ({_what_is_there(storage)}")
        if manifest["format_version"] > FORMAT_VERSION:
            raise DatasetError(
                f"{storage} was packed by a newer maelstream (format {manifest['format_version']}; this one reads up "
                f"to {FORMAT_VERSION}); upgrade maelstream"
            )
        if manifest != with_checksum(manifest):
            raise DatasetError(f"{path} is damaged (its checksum does not match); restore it or pack the dataset again")
        _check_manifest(manifest, path)
        where = f"{storage}/{INDEX_NAME}"
        size, read = _index_reader(storage)
        limits = {
            "shard": (0, len(manifest["shards"]) - 1),
            "size": (0, max(shard["bytes"] for shard in manifest["shards"])),
            "offset": (0, max(shard["bytes"] for shard in manifest["shards"])),
            "width": (1, _MAX_SIDE),
            "height": (1, _MAX_SIDE),
            "label": (0, len(manifest["classes"]) - 1) if manifest["classes"] else (-1, -1),
        }
        numbers, texts = open_columns(where, size, read, manifest["samples"], limits)
        if (in_shards := sum(shard["samples"] for shard in manifest["shards"])) != manifest["samples"]:
            raise DatasetError(
                f"{path} is damaged: its shards have {in_shards} samples, samples is {manifest['samples']}; restore it "
                "or pack the dataset again"
            )
        if not storage.local:
            numbers = _fetched(numbers, read)
        elif size <= hashed_bytes and storage.sha256(INDEX_NAME) != manifest["side_files"].get(INDEX_NAME):
            raise DatasetError(
                f"{where} is damaged (its checksum does not match); restore it or pack the dataset again"
            )
        return cls(storage, manifest, storage.sha256(MANIFEST_NAME), numbers, texts)

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def folder(self) -> str:
        """The dataset's path or URI as the user wrote it."""
        return str(self.storage)

    @property
    def classes(self) -> list[str]:
        """Class names by label; empty without labels."""
        return self.manifest["classes"]

    @property
    def dali_checked(self) -> bool:
        """Whether packing made sure that DALI decodes every image; versions up to 0.1.0 did not."""
        return self.manifest.get("dali_checked", False)

    @cached_property
    def shard_names(self) -> list[str]:
        """File names by shard number."""
        return [shard["name"] for shard in self.manifest["shards"]]

    def siblings(self, sample: int) -> tuple[int, int]:
        """Range of the samples in the same dataset as `sample`: first, last plus one. A mix has several datasets."""
        return 0, len(self)

    def path_and_key(self, sample: int) -> tuple[str, str]:
        """Path of a sample's shard, and the sample's key."""
        return f"{self.folder}/{self.shard_names[int(self.shard[sample])]}", self.keys(np.array([sample]))[0]

    def keys(self, samples: Int64[np.ndarray, "b"]) -> list[str]:
        """Keys of `samples` in their shards."""
        return self._texts["key"][samples]

    def sources(self, samples: Int64[np.ndarray, "b"]) -> list[str]:
        """Names of `samples` in the dataset's sources."""
        return self._texts["source"][samples]


def _index_reader(storage: Storage) -> tuple[int, Read]:
    """Size of the index in bytes, and a function that reads parts of it; the file stays open."""
    where = f"{storage}/{INDEX_NAME}"
    if not storage.local:
        remote = storage.open(INDEX_NAME)

        def read_remote(offset: int, size: int) -> bytes:
            with storage.dataset_errors(INDEX_NAME):
                return remote.read_at(size, offset)

        return remote.size(), read_remote
    try:
        file = Path(storage.path, INDEX_NAME).open("rb", buffering=0)  # noqa: SIM115 - closed with its last reference
        length = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DatasetError(f"{where} is missing or damaged ({error.strerror}); pack the dataset again") from None

    def read_once(offset: int, size: int) -> bytes:
        try:
            data = os.pread(file.fileno(), size, offset)
            while len(data) < size and (more := os.pread(file.fileno(), size - len(data), offset + len(data))):
                data += more  # Linux reads at most 2 GiB per call
        except OSError as error:
            raise StorageError(f"{where} cannot be read ({error.strerror})") from None
        if len(data) < size:
            raise DatasetError(f"{where} was truncated while in use; restore it or pack the dataset again")
        return data

    def read(offset: int, size: int) -> bytes:
        try:
            return read_once(offset, size)
        except StorageError:
            return read_with_retries(lambda: read_once(offset, size))

    return length, read


def _fetched(columns: dict[str, Column], read: Read) -> dict[str, Column]:
    """`columns`, which lie next to each other in the index, in memory."""
    start = min(column.offset for column in columns.values())
    end = max(column.offset + column.length * column.dtype.itemsize for column in columns.values())
    data = memoryview(read(start, end - start))

    def read_fetched(offset: int, size: int) -> bytes:
        return bytes(data[offset - start : offset - start + size])

    return {name: replace(column, read=read_fetched) for name, column in columns.items()}
