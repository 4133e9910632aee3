"""The plan says which sample goes into which shard: a pure function of the sources and the options.

Every worker computes the same plan, on any machine and after any restart, so any worker can build any shard in any
order. The plan is a file in the build's work folder with one record batch per shard, so a worker holds only one shard's
rows in memory.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maelstream.shards.index import write_one_batch
from maelstream.shards.labels import number_labels
from maelstream.shards.storage import WORK, Storage

PLAN = f"{WORK}/plan.arrow"
_HEADERS_BYTES = 1536  # two tar headers and the label's block

ROWS = pa.schema(
    [
        ("file", pa.large_string()),
        ("path", pa.large_string()),
        ("offset", pa.uint64()),
        ("size", pa.uint64()),
        ("label", pa.int32()),  # -1 without labels
        ("label_offset", pa.uint64()),
        ("label_size", pa.uint64()),
    ]
)


@dataclass(frozen=True)
class PackOptions:
    """The options that the bytes of a packed dataset depend on, in addition to its sources."""

    name: str
    split: str
    shard_bytes: int
    seed: int
    resize: int | None = None
    """Short side in pixels; larger images are shrunk to it and encoded again."""
    quality: int | None = None
    """JPEG quality of resized images."""
    label_field: str | None = None
    """JSON field, Parquet column or extension that holds the label; found by name if not given."""
    reencode: bool = False
    """As in `Conversion` (`shards/inspect.py`)."""
    image_field: str | None = None
    """Extension or Parquet column that holds the image; found by name if not given."""
    labels: bool = True
    """Whether labels are packed."""


@dataclass(frozen=True)
class Plan:
    """An opened plan."""

    file: pa.ipc.RecordBatchFileReader

    @classmethod
    def open(cls, destination: Storage) -> "Plan":
        """Opens the plan in the work folder of `destination`; memory-mapped if it is local."""
        if destination.local:
            return cls(pa.ipc.open_file(pa.memory_map(f"{destination.path}/{PLAN}")))
        return cls(pa.ipc.open_file(destination.open(PLAN)))

    def __len__(self) -> int:
        """Number of shards."""
        return self.file.num_record_batches

    @cached_property
    def _facts(self) -> dict:
        return json.loads(self.file.schema.metadata[b"plan"])

    @property
    def classes(self) -> list[str]:
        """Class names by label; empty without labels."""
        return self._facts["classes"]

    @property
    def first_keys(self) -> list[int]:
        """Key of each shard's first sample. A sample's key is its number in the whole plan; it does not depend on the
        images that earlier shards quarantine."""
        return self._facts["first_keys"]

    @property
    def shard_bytes(self) -> list[int]:
        """Bytes of the images that each shard is made of."""
        return self._facts["shard_bytes"]

    @property
    def quarantine(self) -> list[dict[str, str]]:
        """Files found unusable before any image was read: `source` and `reason` of each."""
        return self._facts["left_out"]

    @property
    def notices(self) -> list[str]:
        """Choices that the user should hear of."""
        return self._facts.get("notices", [])

    def rows(self, shard: int) -> pa.RecordBatch:
        """The shard's rows in order, of schema `ROWS`."""
        return self.file.get_batch(shard)


Sharding = Callable[[pa.RecordBatch], Iterator[np.ndarray]]
"""Divides rows into shards: takes all rows and yields the row numbers of each shard, in order."""


def shuffled_sharding(seed: int, shard_bytes: int) -> Sharding:
    """Shuffles all rows by a keyed hash of their paths and divides them into shards of about `shard_bytes`."""

    def divide(rows: pa.RecordBatch) -> Iterator[np.ndarray]:
        if not len(rows):
            return
        keys, key = np.empty(len(rows), np.uint64), str(seed).encode()
        for start in range(0, len(rows), 2**16):
            some = rows.column("path").slice(start, 2**16).to_pylist()
            digests = b"".join(hashlib.blake2b(path.encode(), digest_size=8, key=key).digest() for path in some)
            keys[start : start + len(some)] = np.frombuffer(digests, ">u8")
        order = np.argsort(keys, kind="stable")
        del keys
        # bytes up to and including each row
        ends = np.cumsum(rows.column("size").to_numpy()[order] + np.uint64(_HEADERS_BYTES))
        start, filled = 0, 0
        while start < len(order):
            # A shard ends with the sample that fills it.
            end = int(np.searchsorted(ends, filled + shard_bytes, "left")) + 1
            yield order[start:end]
            start, filled = end, int(ends[min(end, len(order)) - 1])

    return divide


def per_file_sharding(files: list[str]) -> Sharding:
    """Makes one shard of each of `files`, with its rows in the order in which they were found."""

    def divide(rows: pa.RecordBatch) -> Iterator[np.ndarray]:
        numbers = pc.index_in(rows.column("file"), pa.array(files, pa.large_string())).to_numpy()
        for number in range(len(files)):
            yield np.arange(*np.searchsorted(numbers, [number, number + 1]))

    return divide


def write_plan(
    destination: Storage,
    tables: Iterable[pa.Table],
    classes: list[str] | None,
    named: bool,
    sharding: Sharding,
    notices: list[str],
) -> None:
    """Writes the plan of the rows in `tables` (of `ROWS` of `shards/scan_output.py`).

    `classes` are the names by label, if known. `named` says that labels are names, even if they look like numbers.
    `notices` are kept in the plan, with one about images without a usable label.

    Raises:
        DatasetError: a label is outside the classes.
    """
    quarantine: list[dict[str, str]] = []

    def usable() -> Iterator[pa.Table]:
        for table in tables:
            unusable = pc.not_equal(table["reason"], "")
            lines = table.filter(unusable).select(["path", "reason"]).rename_columns(["source", "reason"])
            quarantine.extend(lines.to_pylist())
            yield table.filter(pc.invert(unusable)).select(ROWS.names)

    with destination.scratch() as scratch:
        found = scratch / "found.arrow"
        schema = pa.schema([ROWS.field(n) if n != "label" else pa.field(n, pa.large_string()) for n in ROWS.names])
        with found.open("wb") as file:
            write_one_batch(file, schema, usable(), scratch)
        rows = pa.ipc.open_file(pa.memory_map(str(found))).get_batch(0)
        names, numbers = number_labels(rows, classes, named)
        labelled = names != []
        kept = np.flatnonzero(numbers >= 0) if labelled else np.arange(len(rows))
        for row in rows.take(pa.array(np.flatnonzero(numbers < 0))).to_pylist() if labelled else []:
            quarantine.append({"source": row["path"], "reason": "no label, but others have one"})
        without = [line for line in quarantine if is_about_label(line["reason"])]
        if without:
            first = min(without, key=lambda line: line["source"])
            notices = [
                *notices,
                f"{len(without):,} images left out, such as {first['source']}: {first['reason']}; --no-labels packs "
                "all images, without labels",
            ]
        _write(destination, rows, numbers, kept, names, quarantine, notices, sharding, scratch)


def is_about_label(reason: str) -> bool:
    """Whether an image was left out because of its label."""
    return reason.startswith(("no label", "its label"))


def _write(
    destination: Storage,
    rows: pa.RecordBatch,
    labels: np.ndarray,
    kept: np.ndarray,
    classes: list[str],
    quarantine: list[dict[str, str]],
    notices: list[str],
    sharding: Sharding,
    scratch: Path,
) -> None:
    if len(kept) < len(rows):
        rows, labels = rows.take(pa.array(kept)), labels[kept]
    shards = list(sharding(rows))
    sizes = rows.column("size").to_numpy()
    facts = {
        "classes": classes,
        "first_keys": np.cumsum([0, *map(len, shards[:-1])]).tolist(),
        "shard_bytes": [int(sizes[shard].sum()) for shard in shards],
        "left_out": sorted(quarantine, key=lambda line: line["source"]),
        "notices": notices,
    }
    schema = ROWS.with_metadata({"plan": json.dumps(facts)})
    with destination.atomic_write(PLAN) as file, pa.ipc.new_file(file, schema) as writer:
        for shard in shards:
            columns = dict(zip(rows.schema.names, rows.take(pa.array(shard)).columns, strict=True))
            columns["label"] = pa.array(labels[shard])
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema))
