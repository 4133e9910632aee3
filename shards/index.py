"""The index: the position, size, label and checksum of every sample, one row per sample (docs/shards.md).

An uncompressed Arrow IPC file of one record batch: memory-mapped, it opens in O(1) at any length, and its columns
are numpy arrays without a copy.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

INDEX_NAME = "index.arrow"
SCHEMA = pa.schema(
    [
        ("shard", pa.uint32()),
        ("offset", pa.uint64()),  # of the image's first byte in the shard
        ("size", pa.uint32()),  # bytes
        ("width", pa.uint32()),
        ("height", pa.uint32()),
        ("label", pa.int32()),  # -1 without labels
        ("crc32c", pa.uint32()),
        # Training never touches these two, so their pages are never read.
        ("key", pa.large_string()),
        ("source", pa.large_string()),
    ]
)
NUMERIC_COLUMNS = SCHEMA.names[:-2]


def write_one_batch(file: BinaryIO, schema: pa.Schema, tables: Iterable[pa.Table], scratch: Path) -> int:
    """Writes `tables` of `schema` (numbers and large strings, no nulls) as one record batch; returns the row count.

    Memory does not grow with the rows: each column is collected in files in the folder `scratch`, then mapped.
    """
    columns = [_Column(field.type, scratch / f"column-{number}") for number, field in enumerate(schema)]
    for table in tables:
        for column, data in zip(columns, table.columns, strict=True):
            for chunk in data.chunks:
                column.append(chunk)
    batch = pa.RecordBatch.from_arrays([column.mapped() for column in columns], schema=schema)
    with pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(batch)
    return len(batch)


class _Column:
    """The Arrow buffers of one column, collected in files."""

    def __init__(self, kind: pa.DataType, path: Path):
        self._kind, self._length = kind, 0
        self._paths = [path.with_suffix(".values")]
        if pa.types.is_large_string(kind):
            self._paths.insert(0, path.with_suffix(".offsets"))
        self._files = [path.open("wb") for path in self._paths]
        self._text_bytes = 0  # written so far
        if len(self._files) == 2:
            self._files[0].write(bytes(8))  # the first string begins at 0

    def append(self, chunk: pa.Array) -> None:
        self._length += len(chunk)
        if len(self._files) == 1:
            self._files[0].write(chunk.to_numpy(zero_copy_only=True).data)
        elif len(chunk):
            _, offsets_buffer, text = chunk.buffers()
            offsets = np.frombuffer(offsets_buffer, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            self._files[0].write((offsets[1:] - offsets[0] + self._text_bytes).data)
            if text is not None:
                self._files[1].write(memoryview(text)[offsets[0] : offsets[-1]])
            self._text_bytes += int(offsets[-1] - offsets[0])

    def mapped(self) -> pa.Array:
        for file in self._files:
            file.close()
        buffers = [
            pa.memory_map(str(path)).read_buffer() if path.stat().st_size else pa.py_buffer(b"") for path in self._paths
        ]
        return pa.Array.from_buffers(self._kind, self._length, [None, *buffers])
