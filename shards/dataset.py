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
from maelstream.shards.index import INDEX_NAME, NUMBERS, SCHEMA
from maelstream.shards.storage import Storage

FORMAT_VERSION = 1
MANIFEST_NAME, INFO_NAME, QUARANTINE_NAME = "dataset.json", "_info.json", "quarantine.jsonl"


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """`manifest` with a checksum of everything else in it."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return rest | {"checksum": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


class Dataset:
    """A packed dataset. Columns are read-only numpy arrays over the memory map, a number a sample, in order:

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
        """`open_index` gives columns of the index by name; `Dataset.open` is how users make one of these."""
        self.storage, self.manifest, self.fingerprint, self._open_index = storage, manifest, fingerprint, open_index
        self._numbers = open_index(NUMBERS)
        for name, column in zip(NUMBERS, self._numbers.columns, strict=True):
            setattr(self, name, column.to_numpy(zero_copy_only=True))

    @classmethod
    def open(cls, folder: str | Path) -> "Dataset":
        """Opens what `maelstream pack` or `maelstream index` wrote: in O(1) where it is local; of a remote one the
        index's numbers, 32 bytes a sample, are fetched.

        Raises:
            DatasetError: not there, unfinished, of a newer format, or an index that does not match the manifest.
        """
        return cls.open_storage(Storage.at(folder))

    @classmethod
    def open_storage(cls, storage: Storage) -> "Dataset":
        """As `open`, of a folder that is known already."""
        path = f"{storage}/{MANIFEST_NAME}"
        entries = {entry.name for entry in storage.entries()} if storage.kind() == FileType.Directory else set()
        if MANIFEST_NAME not in entries:
            why = "its packing was not finished: run the same `maelstream pack` again" if entries else "missing"
            raise DatasetError(
                f"{storage} is no packed dataset (no {MANIFEST_NAME}; {why}); `maelstream pack SRC {storage}` makes one"
            )
        text = storage.read(MANIFEST_NAME)
        try:
            manifest = json.loads(text)
        except ValueError as error:
            raise DatasetError(f"{path} is damaged ({error}); pack the dataset again") from None
        if manifest["format_version"] > FORMAT_VERSION:
            raise DatasetError(
                f"{storage} was packed by a newer maelstream (format {manifest['format_version']}; this one reads up "
                f"to {FORMAT_VERSION}); upgrade maelstream"
            )
        if manifest != sealed(manifest):
            raise DatasetError(f"{path} is damaged (its checksum does not fit); restore it or pack the dataset again")
        dataset = cls(storage, manifest, hashlib.sha256(text).hexdigest(), partial(_index_columns, storage))
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
        """Where it lies, as the user wrote it."""
        return str(self.storage)

    @property
    def classes(self) -> list[str]:
        """Class names by label; empty without labels."""
        return self.manifest["classes"]

    @cached_property
    def shard_names(self) -> list[str]:
        """File names by shard number."""
        return [shard["name"] for shard in self.manifest["shards"]]

    @cached_property
    def _texts(self) -> pa.RecordBatch:
        return self._open_index(["key", "source"])

    def siblings(self, sample: int) -> tuple[int, int]:
        """First sample of the dataset that `sample` is in, and the one after its last."""
        return 0, len(self)

    def path_and_key(self, sample: int) -> tuple[str, str]:
        """Shard and key of a sample."""
        return f"{self.folder}/{self.shard_names[int(self.shard[sample])]}", self.keys(np.array([sample]))[0]

    def keys(self, samples: Int64[np.ndarray, "b"]) -> list[str]:
        """Keys of `samples` in their shards."""
        return self._texts.column("key").take(pa.array(samples)).to_pylist()

    def sources(self, samples: Int64[np.ndarray, "b"]) -> list[str]:
        """What `samples` were called where they came from."""
        return self._texts.column("source").take(pa.array(samples)).to_pylist()


def _index_columns(storage: Storage, names: list[str]) -> pa.RecordBatch:
    """Columns of the index, mapped where it is local and fetched where it is remote."""
    try:
        if storage.local:
            return pa.ipc.open_file(pa.memory_map(f"{storage.path}/{INDEX_NAME}")).get_batch(0).select(names)
        # Of a mapped file this would copy the columns.
        options = pa.ipc.IpcReadOptions(included_fields=[SCHEMA.get_field_index(name) for name in names])
        return pa.ipc.open_file(storage.open(INDEX_NAME), options=options).get_batch(0)
    except (OSError, pa.ArrowInvalid, DatasetError) as error:
        raise DatasetError(f"{storage}/{INDEX_NAME} is missing or damaged ({error}); pack the dataset again") from None
