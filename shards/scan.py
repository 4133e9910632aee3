"""What lies inside one tar or Parquet file: where each image is, and its label. Runs in a worker.

Tars are walked header by header, because a plan that shuffles everything needs offsets and webdataset's own iterator
gives none; which members make a sample is webdataset's rule (`group_by_keys`). Parquet cannot be read at random, so its
images are copied, one behind another, into a file of the build's work folder.
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
from maelstream.shards.storage import WORK, is_text

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")  # where names must do: which member
LABEL_FIELDS = ("label", "cls", "class", "class_id", "target", "labels", "fine_label")
_IMAGE_COLUMNS = ("image", "img", *IMAGE_EXTENSIONS)
_ROWS = 2**16  # written at a time
_REMOTE_BUFFER_BYTES = 2**23  # a request to a store costs as much as reading megabytes

ROWS = pa.schema(
    [
        ("file", pa.large_string()),  # that holds the bytes
        ("path", pa.large_string()),  # what the image is called where it comes from
        ("offset", pa.uint64()),
        ("size", pa.uint64()),
        ("label", pa.large_string()),  # as found; empty without one
        ("label_offset", pa.uint64()),  # of a member that holds the label alone
        ("label_size", pa.uint64()),  # 0 where there is none
        ("reason", pa.large_string()),  # why it cannot enter; empty if it may
    ]
)


class Row(NamedTuple):
    """One of `ROWS`."""

    file: str
    path: str
    offset: int
    size: int
    label: str
    label_offset: int = 0
    label_size: int = 0
    reason: str = ""


def scan(job: ScanJob) -> tuple[int, int]:
    """Writes the file's rows to `job.output`, and what it says of classes to the schema's metadata.

    Returns its number and how many rows it has.

    Raises:
        DatasetError: a damaged file, members that leave the folder, links, duplicate keys, no column of images.
    """
    if job.done(job.destination.names(WORK)):  # by another part, meanwhile
        return job.number, 0
    with job.source.open(job.file) as opened, job.source.explained(job.file):
        if job.file.endswith(".parquet"):
            with job.destination.written_whole(job.spool) as spool:
                table = _ParquetFile(job, opened)
                return job.number, _write(job, table.classes, False, table.rows(spool))
        # pyarrow reads only the bytes requested, and a header has 512 bytes
        buffer_bytes = io.DEFAULT_BUFFER_SIZE if job.source.local else _REMOTE_BUFFER_BYTES
        file = io.BufferedReader(opened, buffer_bytes)
        nested = _first_member(job, file).endswith(".tar")
        rows = _nested_rows(job, file) if nested else _flat_rows(job, file)
        return job.number, _write(job, None, nested or job.ground_truth is not None, rows)


def _write(job: ScanJob, classes: list[str] | None, named: bool, rows: Iterator[Row]) -> int:
    count, schema = 0, ROWS.with_metadata({"facts": json.dumps({"classes": classes, "named": named})})
    with job.destination.written_whole(job.output) as file, pa.ipc.new_file(file, schema) as writer:
        while some := list(islice(rows, _ROWS)):
            some = [row if is_text(row.path) else _unnamed(row) for row in some]
            writer.write_table(pa.table(list(zip(*some, strict=True)), schema=schema))
            count += len(some)
    return count


def _unnamed(row: Row) -> Row:
    return row._replace(path=ascii(row.path), label="", reason="its name is not UTF-8")


# --- tars


class Member(NamedTuple):
    name: str
    offset: int
    size: int


def tar_members(file: BinaryIO, shown: str, start: int, end: int) -> Iterator[Member]:
    """The regular files of the tar that lies at `start` to `end` of `file`, in order; `file` may be moved in between.

    Raises:
        DatasetError: a damaged or cut tar, a link or device, a name that leaves the folder.
    """
    try:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it would hold them all
                if info.isdir():
                    continue
                if not info.isreg():
                    raise DatasetError(f"{shown}: member {info.name} is a link or a device; repack the tar without it")
                if info.name.startswith("/") or ".." in info.name.split("/"):
                    raise DatasetError(
                        f"{shown}: member {info.name} leads out of the folder; repack the tar without it"
                    )
                if info.offset_data + info.size > end:
                    raise DatasetError(f"{shown} is cut off inside {info.name}; fetch it again")
                yield Member(info.name, info.offset_data, info.size)
            place = tar.offset
    except tarfile.TarError as error:
        raise DatasetError(f"{shown} is damaged, or no tar ({error}); fetch it again") from None
    # tarfile stops without a word at a header that is none, and at a cut between two members.
    file.seek(place)
    if place + 512 > end or file.read(512).strip(b"\0"):
        raise DatasetError(f"{shown} is cut off or damaged at byte {place - start:,}; fetch it again")


def _members(job: ScanJob, file: BinaryIO) -> Iterator[Member]:
    return tar_members(file, f"{job.source}/{job.file}", 0, file.seek(0, io.SEEK_END))


def _first_member(job: ScanJob, file: BinaryIO) -> str:
    for member in _members(job, file):
        return member.name
    raise DatasetError(f"{job.source}/{job.file} holds no files; remove it")


def _flat_rows(job: ScanJob, file: BinaryIO) -> Iterator[Row]:
    if job.ground_truth is not None:
        return _validation_rows(job, _members(job, file), job.ground_truth)
    return _sample_rows(job, file, _members(job, file))


def _nested_rows(job: ScanJob, file: BinaryIO) -> Iterator[Row]:
    """ILSVRC2012_img_train.tar: a tar of tars, one per class, named after it."""
    for tar in _members(job, file):
        path = f"{job.file}/{tar.name}"
        if not tar.name.endswith(".tar"):
            yield Row(job.file, path, tar.offset, tar.size, "", reason="stands between the tars of the classes")
            continue
        label, seen = tar.name.rpartition("/")[2].removesuffix(".tar"), set()
        for member in tar_members(file, f"{job.source}/{path}", tar.offset, tar.offset + tar.size):
            if member.name in seen:
                raise DatasetError(f"{job.source}/{path}: two members are called {member.name}; repack the tar")
            seen.add(member.name)
            yield Row(job.file, f"{path}/{member.name}", member.offset, member.size, label)


def _validation_rows(job: ScanJob, members: Iterator[Member], ground_truth: list[str]) -> Iterator[Row]:
    """ILSVRC2012_img_val.tar: images by number, whose classes the devkit gives."""
    for member in members:
        number = re.search(r"_(\d{8})\.", member.name)
        if number is None or not 1 <= int(number[1]) <= len(ground_truth):
            raise DatasetError(
                f"{job.source}/{job.file}: {member.name} is none of the {len(ground_truth):,} images that the devkit "
                "knows; take the devkit that belongs to this tar"
            )
        label = ground_truth[int(number[1]) - 1]
        yield Row(job.file, f"{job.file}/{member.name}", member.offset, member.size, label)


def _sample_rows(job: ScanJob, file: BinaryIO, members: Iterator[Member]) -> Iterator[Row]:
    """WebDataset: members that differ in extension alone are one sample."""
    shown = f"{job.source}/{job.file}"
    odd: list[Member] = []  # no extension: webdataset passes over them
    keys: set[str] = set()

    def files() -> Iterator[dict[str, Any]]:
        for member in members:
            if base_plus_ext(member.name)[0] is None:
                odd.append(member)
            else:
                yield {"fname": member.name, "data": member, "__url__": job.file}

    try:
        for sample in group_by_keys(files()):
            key = sample["__key__"]
            if key in keys:
                raise DatasetError(f"{shown}: the key {key} comes twice; repack the tar with one sample a key")
            keys.add(key)
            yield _sample_row(job, file, key, {e: m for e, m in sample.items() if isinstance(m, Member)})
    except ValueError as error:  # webdataset's, for two members of one name
        raise DatasetError(f"{shown}: {str(error.args[0]).partition(' in tar file')[0]}; repack the tar") from None
    for member in odd:
        path = f"{job.file}/{member.name}"
        yield Row(job.file, path, member.offset, member.size, "", reason="its name has no extension")


def _sample_row(job: ScanJob, file: BinaryIO, key: str, parts: dict[str, Member]) -> Row:
    image = next((member for extension, member in parts.items() if extension in IMAGE_EXTENSIONS), None)
    if image is None:
        extensions = ", ".join(sorted(parts))
        return Row(job.file, f"{job.file}/{key}", 0, 0, "", reason=f"no image in this sample, which has {extensions}")
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
    """The label in a sample's JSON, empty without one; ValueError when it is no label."""
    names = LABEL_FIELDS if field is None else [field]
    found = next((values[name] for name in names if name in values), "") if isinstance(values, dict) else values
    if isinstance(found, bool) or not isinstance(found, int | str):
        raise ValueError(f"{json.dumps(found)[:40]} is neither a number nor a name")
    return str(found)


# --- Parquet


class _ParquetFile:
    """Images and labels as Hugging Face's `datasets` stores them: a column of bytes, or of {bytes, path}."""

    def __init__(self, job: ScanJob, file: pa.NativeFile):
        self._job, self._shown = job, f"{job.source}/{job.file}"
        try:
            self._file = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise DatasetError(f"{self._shown} is damaged, or no Parquet file ({error}); fetch it again") from None
        schema = self._file.schema_arrow
        self._image = self._column(schema, _IMAGE_COLUMNS, "image", _holds_bytes)
        wanted = LABEL_FIELDS if job.label_field is None else [job.label_field]
        labels = [name for name in wanted if name in schema.names]
        if job.label_field is not None and not labels:
            raise DatasetError(f"{self._shown} has no column {job.label_field}, just {', '.join(schema.names)}")
        self._label = labels[0] if labels else None
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        self.classes: list[str] | None = features.get(self._label, {}).get("names")

    def _column(self, schema: pa.Schema, names: Iterable[str], what: str, fits: Any) -> str:
        fitting = [field.name for field in schema if fits(field.type)]
        found = [name for name in names if name in fitting] or fitting
        if not found or (len(found) > 1 and found == fitting):
            raise DatasetError(f"{self._shown}: which column holds the {what}? It has {', '.join(schema.names)}")
        return found[0]

    def rows(self, spool: BinaryIO) -> Iterator[Row]:
        """Every row, its image copied to `spool`."""
        columns = [self._image] + ([self._label] if self._label else [])
        number = offset = 0
        try:
            for batch in self._file.iter_batches(batch_size=64, columns=columns):
                labels = batch.column(self._label).to_pylist() if self._label else [None] * len(batch)
                for image, label in zip(batch.column(self._image).to_pylist(), labels, strict=True):
                    data, name = (image["bytes"], image.get("path")) if isinstance(image, dict) else (image, None)
                    path = f"{self._job.file}/{number}" + (f"/{name}" if name else "")
                    text = "" if label is None or label == -1 else str(label)  # -1: a test split's
                    reason = "" if data else "no bytes in this row"
                    yield Row(self._job.spool.rpartition("/")[2], path, offset, len(data or b""), text, reason=reason)
                    offset += spool.write(data or b"")
                    number += 1
        except pa.ArrowInvalid as error:
            raise DatasetError(f"{self._shown} is damaged ({error}); fetch it again") from None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
