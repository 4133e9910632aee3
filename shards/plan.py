"""Which sample goes into which shard: a pure function of the sources and the options.

Any worker, on any machine, at any restart, computes the same plan, so shards can be built in any order and by anybody.
The plan is a file of the build's work folder, a record batch a shard, so nobody holds more than a shard of it in
memory.
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

from maelstream.shards.errors import DatasetError
from maelstream.shards.index import write_one_batch
from maelstream.shards.storage import WORK, Storage

PLAN = f"{WORK}/plan.arrow"
_LARGEST_LABEL = 99_999  # without class names; ImageNet-22k has 21,841
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
    """Short side in pixels; larger images are made so small and encoded again."""
    quality: int | None = None
    """JPEG quality of images that are encoded again."""
    label_field: str | None = None
    """JSON field or Parquet column that holds the label; found by name if not given."""


@dataclass(frozen=True)
class Plan:
    """An opened plan."""

    file: pa.ipc.RecordBatchFileReader

    @classmethod
    def open(cls, destination: Storage) -> "Plan":
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
        """Number of each shard's first sample. A sample's key is its number in the whole plan, so no shard needs to
        know what was left out of earlier ones."""
        return self._facts["first_keys"]

    @property
    def shard_bytes(self) -> list[int]:
        """Bytes of the images that each shard is made of."""
        return self._facts["shard_bytes"]

    @property
    def left_out(self) -> list[dict[str, str]]:
        """What was seen to be unfit before any image was read: `source` and `reason`."""
        return self._facts["left_out"]

    def rows(self, shard: int) -> pa.RecordBatch:
        """The shard's rows in order, of schema `ROWS`."""
        return self.file.get_batch(shard)


Cut = Callable[[pa.RecordBatch], Iterator[np.ndarray]]
"""From rows as they were found to the rows of each shard, in order."""


def shuffled(seed: int, shard_bytes: int) -> Cut:
    """Shuffles all rows by a keyed hash of their paths, and cuts them into shards of about `shard_bytes`."""

    def cut(rows: pa.RecordBatch) -> Iterator[np.ndarray]:
        if not len(rows):
            return
        keys, key = np.empty(len(rows), np.uint64), str(seed).encode()
        for start in range(0, len(rows), 2**16):
            some = rows.column("path").slice(start, 2**16).to_pylist()
            digests = b"".join(hashlib.blake2b(path.encode(), digest_size=8, key=key).digest() for path in some)
            keys[start : start + len(some)] = np.frombuffer(digests, ">u8")
        order = np.argsort(keys, kind="stable")
        del keys
        before = np.cumsum(rows.column("size").to_numpy()[order] + np.uint64(_HEADERS_BYTES))  # bytes up to here
        start, filled = 0, 0
        while start < len(order):
            # a shard ends with the sample that fills it
            end = int(np.searchsorted(before, filled + shard_bytes, "left")) + 1
            yield order[start:end]
            start, filled = end, int(before[min(end, len(order)) - 1])

    return cut


def as_found(files: list[str]) -> Cut:
    """A shard for each of `files`, its rows in the order in which they were found."""

    def cut(rows: pa.RecordBatch) -> Iterator[np.ndarray]:
        numbers = pc.index_in(rows.column("file"), pa.array(files, pa.large_string())).to_numpy()
        for number in range(len(files)):
            yield np.arange(*np.searchsorted(numbers, [number, number + 1]))

    return cut


def write_plan(
    destination: Storage, tables: Iterable[pa.Table], classes: list[str] | None, named: bool, cut: Cut
) -> None:
    """Writes the plan of the rows in `tables` (of `ROWS` of `shards/scan.py`).

    `classes` are the names by label, where they are known; `named` says that labels are names, even if they look
    like numbers.

    Raises:
        DatasetError: labels outside the classes, or none that makes sense.
    """
    left_out: list[dict[str, str]] = []

    def fit() -> Iterator[pa.Table]:
        for table in tables:
            unfit = pc.not_equal(table["reason"], "")
            lines = table.filter(unfit).select(["path", "reason"]).rename_columns(["source", "reason"])
            left_out.extend(lines.to_pylist())
            yield table.filter(pc.invert(unfit)).select(ROWS.names)

    with destination.scratch() as scratch:
        found = scratch / "found.arrow"
        schema = pa.schema([ROWS.field(n) if n != "label" else pa.field(n, pa.large_string()) for n in ROWS.names])
        with found.open("wb") as file:
            write_one_batch(file, schema, fit(), scratch)
        rows = pa.ipc.open_file(pa.memory_map(str(found))).get_batch(0)
        names, numbers = _numbered(rows, classes, named)
        labelled = names != []
        places = np.flatnonzero(numbers >= 0) if labelled else np.arange(len(rows))
        for row in rows.take(pa.array(np.flatnonzero(numbers < 0))).to_pylist() if labelled else []:
            left_out.append({"source": row["path"], "reason": "no label, where others have one"})
        _write(destination, rows, numbers, places, names, left_out, cut, scratch)


def _write(
    destination: Storage,
    rows: pa.RecordBatch,
    labels: np.ndarray,
    places: np.ndarray,
    classes: list[str],
    left_out: list[dict[str, str]],
    cut: Cut,
    scratch: Path,
) -> None:
    kept = rows if len(places) == len(rows) else rows.take(pa.array(places))
    labels = labels[places]
    shards = list(cut(kept))
    sizes = kept.column("size").to_numpy()
    facts = {
        "classes": classes,
        "first_keys": np.cumsum([0, *map(len, shards[:-1])]).tolist(),
        "shard_bytes": [int(sizes[shard].sum()) for shard in shards],
        "left_out": sorted(left_out, key=lambda line: line["source"]),
    }
    schema = ROWS.with_metadata({"plan": json.dumps(facts)})
    with destination.written_whole(PLAN) as file, pa.ipc.new_file(file, schema) as writer:
        for shard in shards:
            columns = dict(zip(kept.schema.names, kept.take(pa.array(shard)).columns, strict=True))
            columns["label"] = pa.array(labels[shard])
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema))


def _numbered(rows: pa.RecordBatch, classes: list[str] | None, named: bool) -> tuple[list[str], np.ndarray]:
    """Class names by label, and each row's label, int32; no names and -1 where no row has a label."""
    encoded = rows.column("label").dictionary_encode()
    texts: list[str] = encoded.dictionary.to_pylist()
    found = sorted(set(texts) - {""})
    if not found:
        return [], np.full(len(rows), -1, np.int32)
    if not named and all(text.lstrip("-").isascii() and text.lstrip("-").isdigit() for text in found):
        by_text = {text: int(text) for text in found}
        largest = max(by_text.values())
        if classes is None and largest <= _LARGEST_LABEL:
            classes = [str(number) for number in range(largest + 1)]
        last = len(classes) - 1 if classes is not None else _LARGEST_LABEL
        outside = next((text for text in found if not 0 <= by_text[text] <= last), None)
    else:
        classes = classes or found
        by_name = {name: number for number, name in enumerate(classes)}
        outside = next((text for text in found if text not in by_name), None)
        by_text = {text: by_name.get(text, -1) for text in found}
        last = len(classes) - 1
    if outside is not None:
        place = encoded.dictionary.index(outside).as_py()
        first = rows.column("path")[int(np.flatnonzero(encoded.indices.to_numpy() == place)[0])]
        raise DatasetError(
            f"{first}: label {outside} is outside the classes, 0 to {last}; give their names by --classes"
        )
    assert classes is not None
    numbers = np.array([by_text.get(text, -1) for text in texts], np.int32)
    return classes, numbers[encoded.indices.to_numpy()]
