"""The index: the position, size, label and checksum of every sample, one row per sample (docs/shards.md).

An uncompressed Arrow IPC file of one record batch. It opens in O(1) at any length, and rows are read by position. It is
not memory-mapped, because SIGBUS kills a process that touches a mapped file after another program has truncated it.
"""

import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from maelstream.shards.errors import DatasetError

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
        # Training never touches these two.
        ("key", pa.large_string()),
        ("source", pa.large_string()),
    ]
)
NUMERIC_COLUMNS = SCHEMA.names[:-2]
_ENDS_BYTES = 2**16  # at each end of the file: more than the 2 KB of Arrow's descriptions
_GAP_BYTES = 2**12  # Reading this much takes as long as one more call.
_MAP_NORESERVE = 0x4000  # Linux; Python's mmap has no name for it
_TEXT_BYTES = 2**20  # No key or path is longer.

Read = Callable[[int, int], bytes]
"""Reads bytes of the index at (offset, size); DatasetError if the file has become shorter."""


@dataclass(frozen=True)
class Column:
    """One number per sample. `column[samples]` reads rows, `column[:]` all of them; both are read-only numpy arrays.

    A row outside of the range `low` to `high` raises a DatasetError: the index is damaged.
    """

    where: str
    """File and name of the column, for messages."""
    read: Read
    offset: int
    """Position of the first row in the file, in bytes."""
    length: int
    dtype: np.dtype
    low: int
    high: int

    def __len__(self) -> int:
        return self.length

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype)

    def min(self) -> int:
        """The smallest number; reads all rows."""
        return int(self[:].min())

    def max(self) -> int:
        """The largest number; reads all rows."""
        return int(self[:].max())

    def __getitem__(self, samples: Any) -> Any:
        """Numbers of an array of samples or of a slice; of one sample, a numpy scalar."""
        if isinstance(samples, slice):
            numbers = range(self.length)[samples]
            if not numbers:
                return np.empty(0, self.dtype)
            first, last = min(numbers[0], numbers[-1]), max(numbers[0], numbers[-1])
            values = self._span(first, last + 1)[:: numbers.step if numbers.step > 0 else -1]
            return values if numbers.step > 0 else values[:: -numbers.step]
        rows = np.atleast_1d(samples)
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        elif rows.size and not (0 <= rows.min() and rows.max() < self.length):
            raise IndexError(f"sample {rows.min()} to {rows.max()} of {self.length}")
        values = self._rows(rows) if rows.size else np.empty(0, self.dtype)
        return values if np.ndim(samples) else values[0]

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        first, last, item = int(rows.min()), int(rows.max()), self.dtype.itemsize
        if (last + 1 - first) * item <= _GAP_BYTES * len(rows):
            return self._span(first, last + 1)[rows - first]
        read, start = self.read, self.offset
        data = b"".join([read(start + row * item, item) for row in rows.tolist()])
        return self._in_range(np.frombuffer(data, self.dtype), rows)

    def _span(self, first: int, end: int) -> np.ndarray:
        item = self.dtype.itemsize
        data = self.read(self.offset + first * item, (end - first) * item)
        return self._in_range(np.frombuffer(data, self.dtype), range(first, end))

    def _in_range(self, values: np.ndarray, rows: Any) -> np.ndarray:
        if values.min() < self.low or values.max() > self.high:
            bad = int(np.flatnonzero((values < self.low) | (values > self.high))[0])
            raise DatasetError(
                f"{self.where} of sample {rows[bad]} is {values[bad]}, not {self.low} to {self.high}: the index is "
                "damaged; restore it or pack the dataset again"
            )
        return values


@dataclass(frozen=True)
class TextColumn:
    """One text per sample."""

    starts: Column
    """Where each text starts in the bytes of all texts, and where the last one ends: one more than there are texts."""
    offset: int
    """Position of the first text in the file, in bytes."""

    def __getitem__(self, samples: Int64[np.ndarray, "b"]) -> list[str]:
        """Texts of `samples`. DatasetError if the index is damaged."""
        if not len(samples):
            return []
        starts, ends = self.starts[samples].tolist(), self.starts[samples + 1].tolist()
        longest = max(end - start for start, end in zip(starts, ends, strict=True))
        if any(end < start for start, end in zip(starts, ends, strict=True)) or longest > _TEXT_BYTES:
            raise DatasetError(f"{self.starts.where}: the index is damaged; restore it or pack the dataset again")
        first, end = min(starts), max(ends)
        read = self.starts.read
        if end - first <= _GAP_BYTES * len(samples):
            whole = read(self.offset + first, end - first)
            texts = [whole[start - first : end - first] for start, end in zip(starts, ends, strict=True)]
        else:
            texts = [read(self.offset + start, end - start) for start, end in zip(starts, ends, strict=True)]
        try:
            return [text.decode() for text in texts]
        except UnicodeDecodeError as error:
            raise DatasetError(
                f"{self.starts.where} is not UTF-8 ({error.reason}): the index is damaged; restore it or pack the "
                "dataset again"
            ) from None


def open_columns(
    where: str, size: int, read: Read, rows: int, limits: dict[str, tuple[int, int]]
) -> tuple[dict[str, Column], dict[str, TextColumn]]:
    """Columns of numbers and of texts by name, of an index file of `size` bytes; reads 128 KiB of it.

    `limits` gives the smallest and largest number per column; by default all numbers of its type are accepted.

    Raises:
        DatasetError: the file is no index of `rows` samples.
    """
    try:
        batch, base = _described(size, read)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"{where} is damaged ({reason}); restore it or pack the dataset again") from None
    if len(batch) != rows:
        raise DatasetError(
            f"{where} has {len(batch)} samples, dataset.json says {rows}; restore both or pack the dataset again"
        )
    numbers: dict[str, Column] = {}
    texts: dict[str, TextColumn] = {}
    for field, column in zip(SCHEMA, batch.columns, strict=True):
        valid, *buffers = column.buffers()
        named = f"{where}: {field.name}"
        if valid is not None or column.null_count:
            raise DatasetError(f"{named} has missing values (nulls); restore the index or pack the dataset again")
        if len(buffers) == 1:
            dtype = np.dtype(field.type.to_pandas_dtype())
            info = np.iinfo(dtype)
            low, high = limits.get(field.name, (int(info.min), int(info.max)))
            numbers[field.name] = Column(named, read, _position(buffers[0], base), rows, dtype, low, high)
            _check_length(named, buffers[0], rows * dtype.itemsize)
        else:
            _check_length(named, buffers[0], (rows + 1) * 8)
            text_bytes = 0 if buffers[1] is None else buffers[1].size
            starts = Column(named, read, _position(buffers[0], base), rows + 1, np.dtype(np.int64), 0, text_bytes)
            texts[field.name] = TextColumn(starts, 0 if buffers[1] is None else _position(buffers[1], base))
    return numbers, texts


def _described(size: int, read: Read) -> tuple[pa.RecordBatch, int]:
    """The record batch with empty columns, whose buffers have the right addresses, and the address of the file's start.

    Arrow describes the buffers at both ends of the file. These are copied into memory as large as the file, whose other
    pages are never touched and take no space.
    """
    if size < 16:
        raise ValueError(f"it has {size} bytes")
    sparse = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    head = min(size, _ENDS_BYTES)
    sparse[:head] = read(0, head)
    tail = min(size, _ENDS_BYTES)
    sparse[size - tail :] = read(size - tail, tail)
    whole = pa.py_buffer(sparse)
    file = pa.ipc.open_file(pa.BufferReader(whole))
    if file.num_record_batches != 1:
        raise ValueError(f"it has {file.num_record_batches} record batches, not one")
    if not file.schema.equals(SCHEMA):
        raise ValueError(f"it has the columns {_columns_text(file.schema)}, not {_columns_text(SCHEMA)}")
    return file.get_batch(0), whole.address


def _position(buffer: pa.Buffer, base: int) -> int:
    return buffer.address - base


def _check_length(where: str, buffer: pa.Buffer | None, needed: int) -> None:
    if buffer is None or buffer.size < needed:
        found = 0 if buffer is None else buffer.size
        raise DatasetError(
            f"{where} has {found} bytes, {needed} are needed; restore the index or pack the dataset again"
        )


def _columns_text(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


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
