"""Compares opening and reading datasets of 1 million and 100 million rows; the aim is no difference.

The rows are generated, not packed; the shards are sparse files of the right length. Each dataset is opened in a new
process. 100 million rows need 25 GB of disk.

    python benchmarks/index.py --rows 100_000_000
"""

import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import tyro
from rich.console import Console
from rich.table import Table

from maelstream.shards.dataset import FORMAT_VERSION, MANIFEST_NAME, Dataset, with_checksum
from maelstream.shards.index import INDEX_NAME, SCHEMA, write_one_batch
from maelstream.shards.reader import ShardReader
from maelstream.shards.storage import Storage

_CHUNK = 1_000_000
_SAMPLE_BYTES, _PER_SHARD = 110_000, 2_400  # as in ImageNet
_BATCH, _BATCHES = 64, 500


@dataclass(frozen=True)
class Options:
    """Compare a small and a large index."""

    rows: int = 100_000_000
    """Rows of the large index."""
    folder: Path | None = None
    """Folder for the datasets, on a disk with 25 GB free. Default: the system's folder for temporary files."""
    json: Path | None = None
    """Also write the figures to this file."""


def texts(numbers: np.ndarray, prefix: str) -> pa.Array:
    """`prefix` and 12 digits for each number."""
    digits = (numbers[:, None] // 10 ** np.arange(11, -1, -1) % 10 + ord("0")).astype(np.uint8)
    head = np.broadcast_to(np.frombuffer(prefix.encode(), np.uint8), (len(numbers), len(prefix)))
    text = np.concatenate([head, digits], axis=1)  # (n, length)
    offsets = np.arange(len(numbers) + 1, dtype=np.int64) * text.shape[1]
    return pa.Array.from_buffers(pa.large_string(), len(numbers), [None, pa.py_buffer(offsets), pa.py_buffer(text)])


def generated_rows(rows: int) -> Iterator[pa.Table]:
    """Yields the rows of an index in tables of a million."""
    for start in range(0, rows, _CHUNK):
        number = np.arange(start, min(start + _CHUNK, rows))
        columns = {
            "shard": number // _PER_SHARD,
            "offset": number % _PER_SHARD * (_SAMPLE_BYTES + 1536) + 512,
            "size": np.full(len(number), _SAMPLE_BYTES),
            "width": 300 + number % 200,
            "height": 300 + number % 170,
            "label": number % 1000,
            "crc32c": number * 2654435761 % 2**32,
        }
        arrays = {
            name: pa.array(values.astype(SCHEMA.field(name).type.to_pandas_dtype())) for name, values in columns.items()
        }
        yield pa.table(arrays | {"key": texts(number, ""), "source": texts(number, "n01440764/n01440764_")}, SCHEMA)


def write_dataset(folder: Path, rows: int) -> None:
    """Writes a dataset of `rows` samples with sparse files as shards."""
    folder.mkdir()
    with tempfile.TemporaryDirectory(dir=folder) as scratch, (folder / INDEX_NAME).open("wb") as file:
        write_one_batch(file, SCHEMA, generated_rows(rows), Path(scratch))
    shard_bytes = _PER_SHARD * (_SAMPLE_BYTES + 1536) + 1024
    shards: list[dict] = []
    for number in range(-(-rows // _PER_SHARD)):
        name = f"made-train-{number:06d}.tar"
        shards.append(
            {
                "name": name,
                "samples": min(_PER_SHARD, rows - number * _PER_SHARD),
                "bytes": shard_bytes,
                "sha256": f"{number:064x}",
            }
        )
        with (folder / name).open("wb") as file:
            file.truncate(shard_bytes)
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": "made",
        "split": "train",
        "samples": rows,
        "quarantined": 0,
        "formats": {"jpg": rows},
        "adopted": False,
        "options": {"resize": None},
        "plan": "",
        "classes": [f"n{number:08d}" for number in range(1000)],
        "shards": shards,
        "side_files": {INDEX_NAME: Storage.at(folder).sha256(INDEX_NAME)}
        | {f"{shard['name'][:-4]}.idx": shard["sha256"] for shard in shards},
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(with_checksum(manifest), indent=1))


def measure(folder: Path) -> dict[str, float]:
    """Time and memory to open a dataset and to read samples anywhere in it."""

    def resident_mib() -> float:
        return psutil.Process().memory_info().rss / 2**20

    figures = {"resident before, MiB": resident_mib()}
    began = time.perf_counter()
    dataset = Dataset.open(folder)
    reader = ShardReader(dataset, check_crc=False)
    figures["open, s"] = time.perf_counter() - began
    figures["resident after, MiB"] = resident_mib()
    random = np.random.default_rng(0)
    # Only 50 shards, all opened before timing: a shard is opened once, and opening is not what is measured.
    some_shards = random.integers(0, len(dataset.shard_names), 50)
    chosen = np.flatnonzero(np.isin(np.arange(len(dataset.shard_names)), some_shards))
    batches = chosen[random.integers(0, len(chosen), (_BATCHES, _BATCH))] * _PER_SHARD
    batches += random.integers(0, _PER_SHARD, batches.shape)
    batches = np.minimum(batches, len(dataset) - 1)
    reader.read(np.unique(batches // _PER_SHARD) * _PER_SHARD)
    began = time.perf_counter()
    for samples in batches:
        reader.read(samples)
    figures["find a sample and read its 110 KB, µs"] = (time.perf_counter() - began) / batches.size * 1e6
    anywhere = random.integers(0, len(dataset), 10_000)
    began = time.perf_counter()
    sizes = dataset.size[anywhere].sum() + dataset.offset[anywhere].sum() + dataset.shard[anywhere].sum()
    figures["look up a row anywhere, µs"] = (time.perf_counter() - began) / len(anywhere) * 1e6
    assert sizes > 0
    return figures


def main() -> None:
    """Measures both datasets and prints one table."""
    options = tyro.cli(Options)
    figures: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for rows in (1_000_000, options.rows):
            write_dataset(Path(folder, str(rows)), rows)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                figures[rows] = pool.apply(measure, (Path(folder, str(rows)),))
    table = Table("", *(f"{rows:,} rows" for rows in figures), "ratio")
    small, large = figures.values()
    for name in small:
        table.add_row(name, f"{small[name]:,.3g}", f"{large[name]:,.3g}", f"{large[name] / small[name]:.2f}")
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps({str(rows): values for rows, values in figures.items()}, indent=1))


if __name__ == "__main__":
    main()
