"""An opened dataset: the manifest, and the index as memory-mapped columns."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from shards.errors import DatasetError
from shards.index import INDEX_NAME, SCHEMA

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

    def __init__(self, folder: Path, manifest: dict[str, Any], fingerprint: str, index: pa.RecordBatch):
        self.folder, self.manifest, self.fingerprint, self._index = folder, manifest, fingerprint, index
        for name in SCHEMA.names[:-2]:
            setattr(self, name, index.column(name).to_numpy(zero_copy_only=True))

    @classmethod
    def open(cls, folder: str | Path) -> "Dataset":
        """Opens a folder that `maelstream pack` wrote, in O(1).

        Raises:
            DatasetError: not there, unfinished, of a newer format, or an index that does not match the manifest.
        """
        folder = Path(folder)
        path = folder / MANIFEST_NAME
        try:
            text = path.read_bytes()
            manifest = json.loads(text)
        except OSError:
            why = "its packing was not finished: run the same `maelstream pack` again" if folder.is_dir() else "missing"
            raise DatasetError(
                f"{folder} is no packed dataset (no {MANIFEST_NAME}; {why}); `maelstream pack SRC {folder}` makes one"
            ) from None
        except ValueError as error:
            raise DatasetError(f"{path} is damaged ({error}); pack the dataset again") from None
        if manifest["format_version"] > FORMAT_VERSION:
            raise DatasetError(
                f"{folder} was packed by a newer maelstream (format {manifest['format_version']}; this one reads up to "
                f"{FORMAT_VERSION}); upgrade maelstream"
            )
        if manifest != sealed(manifest):
            raise DatasetError(f"{path} is damaged (its checksum does not fit); restore it or pack the dataset again")
        try:
            index = pa.ipc.open_file(pa.memory_map(str(folder / INDEX_NAME))).get_batch(0)
        except (OSError, pa.ArrowInvalid) as error:
            raise DatasetError(
                f"{folder / INDEX_NAME} is missing or damaged ({error}); pack the dataset again"
            ) from None
        if len(index) != manifest["samples"]:
            raise DatasetError(
                f"{folder}: {INDEX_NAME} has {len(index)} samples, {MANIFEST_NAME} says {manifest['samples']}; "
                "pack the dataset again"
            )
        return cls(folder, manifest, hashlib.sha256(text).hexdigest(), index)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def classes(self) -> list[str]:
        """Class names by label."""
        return self.manifest["classes"]

    @cached_property
    def shard_names(self) -> list[str]:
        """File names by shard number."""
        return [shard["name"] for shard in self.manifest["shards"]]

    def keys(self, samples: Int64[np.ndarray, "b"]) -> list[str]:
        """Keys of `samples` in their shards."""
        return self._index.column("key").take(pa.array(samples)).to_pylist()

    def sources(self, samples: Int64[np.ndarray, "b"]) -> list[str]:
        """Paths that `samples` had before they were packed."""
        return self._index.column("source").take(pa.array(samples)).to_pylist()
