"""An opened dataset: the manifest, and the index as memory-mapped columns."""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from pyarrow.fs import FileType

from maelstream.shards.errors import DatasetError
from maelstream.shards.index import INDEX_NAME, NUMERIC_COLUMNS, SCHEMA
from maelstream.shards.storage import WORK, Storage

FORMAT_VERSION = 1
MANIFEST_NAME, INFO_NAME, QUARANTINE_NAME = "dataset.json", "_info.json", "quarantine.jsonl"


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
    except ValueError as error:
        raise DatasetError(f"{storage}/{MANIFEST_NAME} is damaged ({error}); pack the dataset again") from None
    ours = isinstance(manifest, dict) and isinstance(manifest.get("format_version"), int) and "plan" in manifest
    return manifest if ours else None


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
    """A packed dataset. Its columns are read-only, memory-mapped numpy arrays with one number per sample:

    `shard`, `size`, `width`, `height`, `crc32c` uint32; `offset` uint64; `label` int32.
    """

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    width: np.ndarray
    height: np.ndarray
    label: np.ndarray
    crc32c: np.ndarray

    def __init__(
        self,
        storage: Storage,
        manifest: dict[str, Any],
        fingerprint: str,
        open_index: Callable[[list[str]], pa.RecordBatch],
    ):
        """`open_index` returns columns of the index by name. Users call `Dataset.open` instead."""
        self.storage, self.manifest, self.fingerprint, self._open_index = storage, manifest, fingerprint, open_index
        self._numbers = open_index(NUMERIC_COLUMNS)
        for name, column in zip(NUMERIC_COLUMNS, self._numbers.columns, strict=True):
            setattr(self, name, column.to_numpy(zero_copy_only=True))

    @classmethod
    def open(cls, folder: str | Path) -> "Dataset":
        """Opens a dataset that `maelstream pack` or `maelstream index` wrote.

        A local one opens in O(1). For a remote one, the numbers of the index are fetched: 32 bytes per sample.

        Raises:
            DatasetError: the dataset is missing, unfinished, damaged or newer, or index and manifest differ.
        """
        return cls.open_storage(Storage.at(folder))

    @classmethod
    def open_storage(cls, storage: Storage) -> "Dataset":
        """As `open`, for a folder given as `Storage`."""
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
        fingerprint = storage.sha256(MANIFEST_NAME)
        dataset = cls(storage, manifest, fingerprint, partial(_index_columns, storage))
        if len(dataset) != manifest["samples"]:
            raise DatasetError(
                f"{storage}: {INDEX_NAME} has {len(dataset)} samples, {MANIFEST_NAME} says {manifest['samples']}; "
                "pack the dataset again"
            )
        return dataset

    def __len__(self) -> int:
        return len(self._numbers)

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

    @cached_property
    def _texts(self) -> pa.RecordBatch:
        return self._open_index(["key", "source"])

    def siblings(self, sample: int) -> tuple[int, int]:
        """Range of the samples in the same dataset as `sample`: first, last plus one. A mix has several datasets."""
        return 0, len(self)

    def path_and_key(self, sample: int) -> tuple[str, str]:
        """Path of a sample's shard, and the sample's key."""
        return f"{self.folder}/{self.shard_names[int(self.shard[sample])]}", self.keys(np.array([sample]))[0]

    def keys(self, samples: Int64[np.ndarray, "b"]) -> list[str]:
        """Keys of `samples` in their shards."""
        return self._texts.column("key").take(pa.array(samples)).to_pylist()

    def sources(self, samples: Int64[np.ndarray, "b"]) -> list[str]:
        """Names of `samples` in the dataset's sources."""
        return self._texts.column("source").take(pa.array(samples)).to_pylist()


def _index_columns(storage: Storage, names: list[str]) -> pa.RecordBatch:
    """Columns of the index: memory-mapped if it is local, fetched if it is remote."""
    try:
        if storage.local:
            return pa.ipc.open_file(pa.memory_map(f"{storage.path}/{INDEX_NAME}")).get_batch(0).select(names)
        # `included_fields` would copy the columns of a mapped file.
        options = pa.ipc.IpcReadOptions(included_fields=[SCHEMA.get_field_index(name) for name in names])
        return pa.ipc.open_file(storage.open(INDEX_NAME), options=options).get_batch(0)
    except (OSError, pa.ArrowInvalid, DatasetError) as error:
        raise DatasetError(f"{storage}/{INDEX_NAME} is missing or damaged ({error}); pack the dataset again") from None
