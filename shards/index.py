"""The index: where every sample lies and what a draw must know of it, a row a sample (docs/design.md, "Formats").

An uncompressed Arrow IPC file of one record batch: memory-mapped, it opens in O(1) whatever its length, and its columns
are numpy arrays without a copy.
"""

from typing import BinaryIO

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


def write_index(file: BinaryIO, rows: pa.Table) -> None:
    """Writes `rows` (of `SCHEMA`, in sample order) as one record batch."""
    with pa.ipc.new_file(file, SCHEMA) as writer:
        for batch in rows.combine_chunks().to_batches():
            writer.write_batch(batch)
