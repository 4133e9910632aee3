"""Builds one shard in a worker: reads, fully decodes and writes its images, or checks those of an existing tar.

Every worker builds the same bytes. The receipt is written after the shard and holds its rows of the index, so a
resumed build keeps every shard that has one.
"""

import hashlib
import json
import os
import re
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from typing import BinaryIO, NamedTuple
from urllib.parse import quote

import google_crc32c
import pyarrow as pa
import webdataset
from webdataset.tariterators import base_plus_ext

from maelstream.shards.build_jobs import Receipt, ShardJob
from maelstream.shards.checks import check_images
from maelstream.shards.errors import DatasetError
from maelstream.shards.index import SCHEMA
from maelstream.shards.inspect import MAX_BYTES, ImageInfo
from maelstream.shards.plan import Plan
from maelstream.shards.storage import Storage

_AHEAD_BYTES = 2**25
_GROUP_BYTES = 2**20
_OPEN_FILES = 128
_SYNC_BYTES = 2**24


class PlanRow(NamedTuple):
    """A row of the plan."""

    file: str
    path: str
    offset: int
    size: int
    label: int
    label_offset: int
    label_size: int


class _Sample(NamedTuple):
    """A usable image."""

    number: int
    """Its row number in the plan of its shard."""
    planned: PlanRow
    data: bytes
    info: ImageInfo


def build(job: ShardJob) -> tuple[int, Receipt]:
    """Builds or adopts a shard and writes its DALI index and receipt; returns the shard's number and the receipt.

    Raises:
        DatasetError: a source cannot be read or has changed, or the destination cannot be written.
    """
    plan = Plan.open(job.destination)
    planned = [PlanRow(**row) for row in plan.rows(job.number).to_pylist()]
    receipt, rows = Receipt(), _ShardRows(job.number)
    samples = _samples(job, planned, receipt)
    if job.adopt:
        _adopt(job, samples, rows)
        receipt.sha256 = job.destination.sha256(job.name)
        with job.destination.open(job.name) as file:
            receipt.bytes = file.size()
    else:
        with job.destination.atomic_write(job.name) as file, ThreadPoolExecutor(1, "sync") as threads:
            hashed = _HashingFile(file, threads)
            _write(hashed, samples, plan.first_keys[job.number], rows)
            hashed.wait_for_sync()
        receipt.sha256, receipt.bytes = hashed.sha256.hexdigest(), hashed.size
    receipt.samples, receipt.formats = len(rows.index), rows.formats
    with job.destination.atomic_write(job.dali_index) as file:
        file.write("\n".join([f"v1.2 {len(rows.dali)}", *rows.dali, ""]).encode())
    schema = SCHEMA.with_metadata({"receipt": json.dumps(asdict(receipt))})
    with job.destination.atomic_write(job.receipt) as file, pa.ipc.new_file(file, schema) as writer:
        columns = zip(*rows.index, strict=True) if rows.index else [()] * len(schema)
        writer.write_table(pa.table([list(column) for column in columns], schema=schema))
    return job.number, receipt


class _ShardRows:
    """Collects a shard's rows for the index, DALI's index and the receipt, sample by sample."""

    def __init__(self, shard: int):
        self.shard = shard
        self.index: list[tuple] = []  # rows of schema `SCHEMA` (`shards/index.py`)
        self.dali: list[str] = []  # lines of DALI's index
        self.formats: dict[str, int] = {}

    def add(self, sample: _Sample, offset: int, key: str, members: list[tuple[str, int, int]]) -> None:
        """Adds a sample; `members` are extension, offset and size of its files, the image first."""
        planned, data, info = sample.planned, sample.data, sample.info
        checksum = google_crc32c.value(data)
        self.index.append(
            (self.shard, offset, len(data), info.width, info.height, planned.label, checksum, key, planned.path)
        )
        name = quote(key, safe="/") if re.search(r"\s", key) else key  # its columns are divided by spaces
        self.dali.append(
            " ".join(f"{extension} {start} {size} {name}.{extension}" for extension, start, size in members)
        )
        self.formats[info.extension] = self.formats.get(info.extension, 0) + 1


def _write(file: "_HashingFile", samples: Iterator[_Sample], first_key: int, rows: _ShardRows) -> None:
    # USTAR, mtime 0 and no owner give the same bytes on every machine.
    writer = webdataset.TarWriter(file, user="", group="", mode=0o644, compress=False, encoder=False, mtime=0)
    writer.tarstream.format = tarfile.USTAR_FORMAT
    # Writes an image in one piece. tarfile's own buffer would copy the rest of the image for every 10 KiB.
    writer.tarstream.fileobj, writer.tarstream.copybufsize = file, MAX_BYTES

    def member(key: str, extension: str, data: bytes) -> tuple[str, int, int]:
        start = writer.tarstream.offset + 512  # after the header, which is one block in USTAR
        writer.write({"__key__": key, extension: data})
        return extension, start, len(data)

    for sample in samples:
        key = f"{first_key + sample.number:09d}"
        members = [member(key, sample.info.extension, sample.data)]
        if sample.planned.label >= 0:
            members.append(member(key, "cls", str(sample.planned.label).encode()))
        rows.add(sample, members[0][1], key, members)
    writer.close()


def _adopt(job: ShardJob, samples: Iterator[_Sample], rows: _ShardRows) -> None:
    for sample in samples:
        planned = sample.planned
        key, extension = base_plus_ext(planned.path[len(job.name) + 1 :])
        members = [(extension, planned.offset, planned.size)]
        if planned.label_size:
            members.append(("cls", planned.label_offset, planned.label_size))
        rows.add(sample, planned.offset, key, members)


def _samples(job: ShardJob, planned: list[PlanRow], receipt: Receipt) -> Iterator[_Sample]:
    """Usable images of `planned`, in order; unusable ones are added to the receipt's quarantine."""
    images = _read_ahead(job.source, planned)
    for number, (row, checked) in enumerate(check_images(images, job.conversion, isolated=job.attempt > 0)):
        if isinstance(checked, str):
            receipt.quarantine.append({"source": row.path, "reason": checked})
        else:
            yield _Sample(number, row, *checked)


def _read_ahead(source: Storage, planned: list[PlanRow]) -> Iterator[tuple[PlanRow, bytes]]:
    """Yields each row and its bytes, in order; threads read ahead while the caller decodes."""
    opened = lru_cache(_OPEN_FILES)(source.open)
    count = 1 if source.local else 16

    def read(row: PlanRow) -> bytes:
        file = opened(row.file)
        with source.dataset_errors(row.file):
            # One byte over the limit is enough to show that a file is too large.
            data = file.read_at(min(row.size, MAX_BYTES + 1), row.offset)
            if (row.file == row.path and file.size() != row.size) or len(data) < min(row.size, MAX_BYTES):
                raise DatasetError(f"{source}/{row.path} has changed since packing began; empty DST and pack again")
        return data

    waiting: deque[tuple[list[PlanRow], Future[list[bytes]]]] = deque()

    def finished() -> Iterator[tuple[PlanRow, bytes]]:
        rows, future = waiting.popleft()
        yield from zip(rows, future.result(), strict=True)

    with ThreadPoolExecutor(count, "read-ahead") as threads:
        for rows in _groups(planned):
            while len(waiting) > count or sum(row.size for ahead, _ in waiting for row in ahead) > _AHEAD_BYTES:
                yield from finished()
            waiting.append((rows, threads.submit(lambda rows: [read(row) for row in rows], rows)))
        while waiting:
            yield from finished()


def _groups(planned: list[PlanRow]) -> Iterator[list[PlanRow]]:
    """Groups of rows for one thread: up to 8 rows or 1 MiB. A task per row would cost more than reading the row."""
    group: list[PlanRow] = []
    for row in planned:
        if group and (len(group) == 8 or sum(other.size for other in group) + row.size > _GROUP_BYTES):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


class _HashingFile:
    """Hashes and counts the bytes written, so that a finished shard need not be read again.

    A thread syncs the file every 16 MiB, so that little is left for the last fsync.
    """

    def __init__(self, file: BinaryIO, threads: ThreadPoolExecutor):
        self._file, self._threads, self.sha256, self.size = file, threads, hashlib.sha256(), 0
        self._sync: Future[None] | None = None
        self._sync_at = _SYNC_BYTES

    def write(self, data: bytes) -> int:
        if self._file.closed:  # after a full disk: tarfile still writes its end when it is garbage-collected
            return len(data)
        self.sha256.update(data)
        self.size += len(data)
        if self.size > self._sync_at:
            self._file.flush()
            self.wait_for_sync()
            self._sync, self._sync_at = self._threads.submit(os.fdatasync, self._file.fileno()), self.size + _SYNC_BYTES
        return self._file.write(data)

    def wait_for_sync(self) -> None:
        """Waits for the last sync; OSError if it failed. The system reports a failure once, not at each fsync."""
        if self._sync is not None:
            self._sync.result()

    def close(self) -> None:
        """Does nothing: tarfile calls this, but the code that opened the file closes it."""
