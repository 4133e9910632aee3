"""What the scan of one source file leaves in the work folder: a row per image, and facts about all of them."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from maelstream.shards.storage import is_utf8

ROWS = pa.schema(
    [
        ("file", pa.large_string()),  # file that holds the bytes
        ("path", pa.large_string()),  # name of the image in the sources
        ("offset", pa.uint64()),
        ("size", pa.uint64()),
        ("label", pa.large_string()),  # as found; empty without one
        ("label_offset", pa.uint64()),  # of a member that holds only the label
        ("label_size", pa.uint64()),  # 0 without such a member
        ("reason", pa.large_string()),  # why the image is unusable; empty if it is usable
    ]
)
_BATCH_ROWS = 2**16
_FACTS = "facts"


class Row(NamedTuple):
    """One row of schema `ROWS`."""

    file: str
    path: str
    offset: int
    size: int
    label: str
    label_offset: int = 0
    label_size: int = 0
    reason: str = ""


@dataclass
class Facts:
    """What a scanned file says about all of its samples."""

    classes: list[str] | None = None
    """Class names by label, if the file holds them."""
    named: bool = False
    """Whether labels are names, even if they look like numbers."""
    only_images: bool = False
    """Whether its samples hold nothing but images, so that the folders in a tar may be the classes."""
    field_found: bool = False
    """Whether a sample has the field that --label-field names."""
    choices: dict[str, list] = field(default_factory=dict)
    """Choices that the user should hear of: how often each was made, and its first example, by kind."""

    def choose(self, kind: str, example: str) -> None:
        """Counts a choice of `kind`."""
        self.choices.setdefault(kind, [0, example])[0] += 1


def write_output(file: BinaryIO, rows: Iterator[Row], facts: Facts) -> int:
    """Writes all rows, then the facts, which are complete by then; returns the number of rows."""
    count = 0
    with pa.ipc.new_file(file, ROWS) as writer:
        while batch := list(islice(rows, _BATCH_ROWS)):
            batch = [row if is_utf8(row.path) else _with_ascii_name(row) for row in batch]
            writer.write_table(pa.table(list(zip(*batch, strict=True)), schema=ROWS))
            count += len(batch)
        empty = pa.RecordBatch.from_pylist([], ROWS)
        writer.write_batch(empty, custom_metadata={_FACTS: json.dumps(asdict(facts))})
    return count


def read_facts(file: pa.ipc.RecordBatchFileReader) -> Facts:
    """The facts; version 0.1 wrote fewer, into the metadata of the schema."""
    if (old := (file.schema.metadata or {}).get(_FACTS.encode())) is not None:
        return Facts(**json.loads(old), field_found=True)
    _, metadata = file.get_batch_with_custom_metadata(file.num_record_batches - 1)
    return Facts(**json.loads(metadata[_FACTS.encode()]))


def read_rows(files: list[pa.ipc.RecordBatchFileReader]) -> Iterator[pa.Table]:
    """The rows of all `files`, in order."""
    for file in files:
        for number in range(file.num_record_batches):
            yield pa.Table.from_batches([file.get_batch(number)]).replace_schema_metadata(None)


def _with_ascii_name(row: Row) -> Row:
    return row._replace(path=ascii(row.path), label="", reason="its name is not UTF-8")
