"""Scans one tar or Parquet file in a worker: finds the offset, size and label of each image.

Tars are read header by header: a plan that shuffles all samples needs their offsets, and webdataset's own iterator
gives none. webdataset's rule (`group_by_keys`) decides which members form a sample. Parquet has no random access, so
its images are copied, one after another, into a file of the build's work folder.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from webdataset.tariterators import base_plus_ext, group_by_keys

from maelstream.shards.build_jobs import ScanJob
from maelstream.shards.errors import DatasetError
from maelstream.shards.storage import WORK, is_utf8

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
"""Extensions that mark the image among the members of a sample; the content decides its format."""
LABEL_FIELDS = ("label", "cls", "class", "class_id", "target", "labels", "fine_label")
_IMAGE_COLUMNS = ("image", "img", *IMAGE_EXTENSIONS)
_ROWS = 2**16  # rows per record batch
_REMOTE_BUFFER_BYTES = 2**23  # a request to a store costs as much as reading megabytes

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


def scan(job: ScanJob) -> tuple[int, int]:
    """Scans the file; writes its rows to `job.output` and its class names to the schema's metadata.

    Returns the job's number and the number of rows; 0 rows if another part has scanned the file already.

    Raises:
        DatasetError: the file is damaged; a tar has links, duplicate keys or names that lead out of the folder; a
            Parquet file has no image column.
    """
    if job.done(job.destination.names(WORK)):  # another part has scanned it meanwhile
        return job.number, 0
    with job.source.open(job.file) as opened, job.source.dataset_errors(job.file):
        if job.file.endswith(".parquet"):
            with job.destination.atomic_write(job.spool) as spool:
                table = _ParquetFile(job, opened)
                return job.number, _write(job, table.classes, False, table.rows(spool))
        # pyarrow does not buffer, and a header has only 512 bytes.
        buffer_bytes = io.DEFAULT_BUFFER_SIZE if job.source.local else _REMOTE_BUFFER_BYTES
        file = io.BufferedReader(opened, buffer_bytes)
        nested = _first_member(job, file).endswith(".tar")
        rows = _nested_rows(job, file) if nested else _flat_rows(job, file)
        return job.number, _write(job, None, nested or job.ground_truth is not None, rows)


def _write(job: ScanJob, classes: list[str] | None, named: bool, rows: Iterator[Row]) -> int:
    count, schema = 0, ROWS.with_metadata({"facts": json.dumps({"classes": classes, "named": named})})
    with job.destination.atomic_write(job.output) as file, pa.ipc.new_file(file, schema) as writer:
        while batch := list(islice(rows, _ROWS)):
            batch = [row if is_utf8(row.path) else _with_ascii_name(row) for row in batch]
            writer.write_table(pa.table(list(zip(*batch, strict=True)), schema=schema))
            count += len(batch)
    return count


def _with_ascii_name(row: Row) -> Row:
    return row._replace(path=ascii(row.path), label="", reason="its name is not UTF-8")


# --- tars


class Member(NamedTuple):
    """A regular file in a tar; offset and size in bytes, offset from the start of the outermost file."""

    name: str
    offset: int
    size: int


def tar_members(file: BinaryIO, shown: str, start: int, end: int) -> Iterator[Member]:
    """Yields the regular files of the tar at bytes `start` to `end` of `file`; the caller may seek in `file` meanwhile.

    `shown` names the tar in messages.

    Raises:
        DatasetError: the tar is damaged or truncated, or has a link, a device or a name that leads out of the folder.
    """
    try:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all members in memory
                if info.isdir():
                    continue
                if not info.isreg():
                    raise DatasetError(f"{shown}: member {info.name} is a link or a device; repack the tar without it")
                if info.name.startswith("/") or ".." in info.name.split("/"):
                    raise DatasetError(
                        f"{shown}: member {info.name} leads out of the folder; repack the tar without it"
                    )
                if info.offset_data + info.size > end:
                    raise DatasetError(f"{shown} is truncated inside {info.name}; download it again")
                yield Member(info.name, info.offset_data, info.size)
            end_of_members = tar.offset
    except tarfile.TarError as error:
        raise DatasetError(f"{shown} is damaged or not a tar ({error}); download it again") from None
    # tarfile stops without an error at an invalid header, and at a truncation between two members.
    file.seek(end_of_members)
    if end_of_members + 512 > end or file.read(512).strip(b"\0"):
        raise DatasetError(f"{shown} is truncated or damaged at byte {end_of_members - start:,}; download it again")


def _members(job: ScanJob, file: BinaryIO) -> Iterator[Member]:
    return tar_members(file, f"{job.source}/{job.file}", 0, file.seek(0, io.SEEK_END))


def _first_member(job: ScanJob, file: BinaryIO) -> str:
    for member in _members(job, file):
        return member.name
    raise DatasetError(f"{job.source}/{job.file} contains no files; remove it")


def _flat_rows(job: ScanJob, file: BinaryIO) -> Iterator[Row]:
    if job.ground_truth is not None:
        return _validation_rows(job, _members(job, file), job.ground_truth)
    return _sample_rows(job, file, _members(job, file))


def _nested_rows(job: ScanJob, file: BinaryIO) -> Iterator[Row]:
    """Rows of ILSVRC2012_img_train.tar: a tar that contains one tar per class, named after the class."""
    for tar in _members(job, file):
        path = f"{job.file}/{tar.name}"
        if not tar.name.endswith(".tar"):
            yield Row(job.file, path, tar.offset, tar.size, "", reason="not inside a tar of a class")
            continue
        label, seen = tar.name.rpartition("/")[2].removesuffix(".tar"), set()
        for member in tar_members(file, f"{job.source}/{path}", tar.offset, tar.offset + tar.size):
            if member.name in seen:
                raise DatasetError(f"{job.source}/{path}: two members have the name {member.name}; repack the tar")
            seen.add(member.name)
            yield Row(job.file, f"{path}/{member.name}", member.offset, member.size, label)


def _validation_rows(job: ScanJob, members: Iterator[Member], ground_truth: list[str]) -> Iterator[Row]:
    """Rows of ILSVRC2012_img_val.tar: numbered images, whose classes are in the devkit."""
    for member in members:
        number = re.search(r"_(\d{8})\.", member.name)
        if number is None or not 1 <= int(number[1]) <= len(ground_truth):
            raise DatasetError(
                f"{job.source}/{job.file}: {member.name} is not one of the {len(ground_truth):,} images in the "
                "devkit; use the devkit that belongs to this tar"
            )
        label = ground_truth[int(number[1]) - 1]
        yield Row(job.file, f"{job.file}/{member.name}", member.offset, member.size, label)


def _sample_rows(job: ScanJob, file: BinaryIO, members: Iterator[Member]) -> Iterator[Row]:
    """Rows of a WebDataset shard: members that differ only in their extension are one sample."""
    shown = f"{job.source}/{job.file}"
    without_extension: list[Member] = []  # webdataset skips them
    keys: set[str] = set()

    def files() -> Iterator[dict[str, Any]]:
        for member in members:
            if base_plus_ext(member.name)[0] is None:
                without_extension.append(member)
            else:
                yield {"fname": member.name, "data": member, "__url__": job.file}

    try:
        for sample in group_by_keys(files()):
            key = sample["__key__"]
            if key in keys:
                raise DatasetError(f"{shown}: two samples have the key {key}; repack the tar with unique keys")
            keys.add(key)
            yield _sample_row(job, file, key, {e: m for e, m in sample.items() if isinstance(m, Member)})
    except ValueError as error:  # from webdataset, for two members of one name
        raise DatasetError(f"{shown}: {str(error.args[0]).partition(' in tar file')[0]}; repack the tar") from None
    for member in without_extension:
        path = f"{job.file}/{member.name}"
        yield Row(job.file, path, member.offset, member.size, "", reason="its name has no extension")


def _sample_row(job: ScanJob, file: BinaryIO, key: str, parts: dict[str, Member]) -> Row:
    image = next((member for extension, member in parts.items() if extension in IMAGE_EXTENSIONS), None)
    if image is None:
        extensions = ", ".join(sorted(parts))
        return Row(job.file, f"{job.file}/{key}", 0, 0, "", reason=f"no image in this sample, only {extensions}")
    row = Row(job.file, f"{job.file}/{image.name}", image.offset, image.size, "")
    try:
        if "cls" in parts and job.label_field is None:
            label = _read(file, parts["cls"]).decode().strip()
            return row._replace(label=label, label_offset=parts["cls"].offset, label_size=parts["cls"].size)
        if "json" in parts:
            return row._replace(label=json_label(json.loads(_read(file, parts["json"])), job.label_field))
        return row
    except ValueError as error:
        return row._replace(reason=f"its label cannot be read ({error})")


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def json_label(values: Any, field: str | None) -> str:
    """The label in a sample's JSON, "" without one; ValueError if it is neither a number nor a name."""
    names = LABEL_FIELDS if field is None else [field]
    found = next((values[name] for name in names if name in values), "") if isinstance(values, dict) else values
    if isinstance(found, bool) or not isinstance(found, int | str):
        raise ValueError(f"{json.dumps(found)[:40]} is neither a number nor a name")
    return str(found)


# --- Parquet


class _ParquetFile:
    """A file of images and labels as Hugging Face's `datasets` writes it: a column of bytes, or of {bytes, path}."""

    def __init__(self, job: ScanJob, file: pa.NativeFile):
        self._job, self._shown = job, f"{job.source}/{job.file}"
        try:
            self._file = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise DatasetError(f"{self._shown} is damaged or not a Parquet file ({error}); download it again") from None
        schema = self._file.schema_arrow
        self._image = self._column(schema, _IMAGE_COLUMNS, "image", _holds_bytes)
        wanted = LABEL_FIELDS if job.label_field is None else [job.label_field]
        labels = [name for name in wanted if name in schema.names]
        if job.label_field is not None and not labels:
            raise DatasetError(f"{self._shown} has no column {job.label_field}, only {', '.join(schema.names)}")
        self._label = labels[0] if labels else None
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        self.classes: list[str] | None = features.get(self._label, {}).get("names")

    def _column(self, schema: pa.Schema, names: Iterable[str], what: str, matches: Any) -> str:
        matching = [field.name for field in schema if matches(field.type)]
        found = [name for name in names if name in matching] or matching
        if not found or (len(found) > 1 and found == matching):
            raise DatasetError(f"{self._shown}: which column holds the {what}? It has {', '.join(schema.names)}")
        return found[0]

    def rows(self, spool: BinaryIO) -> Iterator[Row]:
        """Yields every row and copies its image to `spool`."""
        columns = [self._image] + ([self._label] if self._label else [])
        number = offset = 0
        try:
            for batch in self._file.iter_batches(batch_size=64, columns=columns):
                labels = batch.column(self._label).to_pylist() if self._label else [None] * len(batch)
                for image, label in zip(batch.column(self._image).to_pylist(), labels, strict=True):
                    data, name = (image["bytes"], image.get("path")) if isinstance(image, dict) else (image, None)
                    path = f"{self._job.file}/{number}" + (f"/{name}" if name else "")
                    text = "" if label is None or label == -1 else str(label)  # -1 in test splits
                    reason = "" if data else "no bytes in this row"
                    yield Row(self._job.spool.rpartition("/")[2], path, offset, len(data or b""), text, reason=reason)
                    offset += spool.write(data or b"")
                    number += 1
        except pa.ArrowInvalid as error:
            raise DatasetError(f"{self._shown} is damaged ({error}); download it again") from None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
