"""Scans one file of the sources in a worker: finds the offset, size and label of each image.

Tars are read header by header: a plan that shuffles all samples needs their offsets, and webdataset's own iterator
gives none. webdataset's rule (`group_by_keys`) decides which members form a sample.
"""

import io
import re
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
from webdataset.tariterators import base_plus_ext, group_by_keys

from maelstream.shards.build_jobs import ScanJob
from maelstream.shards.errors import DatasetError
from maelstream.shards.labels import cls_label, json_label
from maelstream.shards.scan_output import Facts, Row, write_output
from maelstream.shards.storage import WORK
from maelstream.shards.tables import table_rows
from maelstream.shards.tars import Member, tar_members

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
"""Extensions that mark the image among the members of a sample; the content decides its format."""
_REMOTE_BUFFER_BYTES = 2**23  # a request to a store costs as much as reading megabytes
_SEVERAL = "samples hold several images; --image-field chooses another"
_DOTS = "names with more than one dot hold several images, each packed as a sample; --image-field chooses one"


def scan(job: ScanJob) -> tuple[int, int]:
    """Scans the file and writes its rows and facts to `job.output`.

    Returns the job's number and the number of rows; 0 rows if another part has scanned the file already.

    Raises:
        DatasetError: the file is damaged; a tar has members that no reader sees as they are stored (`shards/tars.py`)
            or a key twice; a Parquet or Arrow file has no image column.
    """
    if job.done(job.destination.names(WORK)):  # another part has scanned it meanwhile
        return job.number, 0
    facts = Facts()
    with job.source.open(job.file) as opened, job.source.dataset_errors(job.file):
        if job.spools:
            # An Arrow file's batches have a thousand images, which a memory map does not copy.
            file = pa.memory_map(f"{job.source.path}/{job.file}") if job.source.local else opened
            with job.destination.atomic_write(job.spool) as spool:
                return job.number, _write(job, table_rows(job, file, spool, facts), facts)
        # pyarrow does not buffer, and a header has only 512 bytes.
        buffer_bytes = io.DEFAULT_BUFFER_SIZE if job.source.local else _REMOTE_BUFFER_BYTES
        return job.number, _write(job, _tar_rows(job, io.BufferedReader(opened, buffer_bytes), facts), facts)


def _write(job: ScanJob, rows: Iterator[Row], facts: Facts) -> int:
    with job.destination.atomic_write(job.output) as file:
        return write_output(file, rows, facts)


def _tar_rows(job: ScanJob, file: BinaryIO, facts: Facts) -> Iterator[Row]:
    nested = _first_member(job, file).endswith(".tar")
    facts.named = nested or job.ground_truth is not None
    if nested:
        return _nested_rows(job, file)
    if job.ground_truth is not None:
        return _validation_rows(job, _members(job, file), job.ground_truth)
    return _sample_rows(job, file, facts)


def _members(job: ScanJob, file: BinaryIO) -> Iterator[Member]:
    return tar_members(file, f"{job.source}/{job.file}", 0, file.seek(0, io.SEEK_END), only_one=job.adopt)


def _first_member(job: ScanJob, file: BinaryIO) -> str:
    for member in _members(job, file):
        return member.name
    raise DatasetError(f"{job.source}/{job.file} contains no files; remove it")


def _nested_rows(job: ScanJob, file: BinaryIO) -> Iterator[Row]:
    """Rows of ILSVRC2012_img_train.tar: a tar that contains one tar per class, named after the class."""
    for tar in _members(job, file):
        path = f"{job.file}/{tar.name}"
        if not tar.name.endswith(".tar"):
            yield Row(job.file, path, tar.offset, tar.size, "", reason="not inside a tar of a class")
            continue
        label = tar.name.rpartition("/")[2].removesuffix(".tar") if job.options.labels else ""
        seen = set()
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


def _sample_rows(job: ScanJob, file: BinaryIO, facts: Facts) -> Iterator[Row]:
    """Rows of a WebDataset shard, or of a plain tar of images: members that differ only in their extension are one
    sample."""
    shown = f"{job.source}/{job.file}"
    without_extension: list[Member] = []  # webdataset skips them
    keys: set[str] = set()
    facts.only_images = True

    def files() -> Iterator[dict[str, Any]]:
        for member in _members(job, file):
            if base_plus_ext(member.name)[0] is None:
                without_extension.append(member)
            else:
                yield {"fname": member.name, "data": member, "__url__": job.file}

    try:
        for sample in group_by_keys(files()):
            parts = {extension: part for extension, part in sample.items() if isinstance(part, Member)}
            for key, own in _samples_of_key(job, sample["__key__"], parts, facts):
                if key in keys:
                    raise DatasetError(f"{shown}: two samples have the key {key}; repack the tar with unique keys")
                keys.add(key)
                yield _sample_row(job, file, key, own, facts)
    except ValueError as error:  # from webdataset, for two members of one name
        raise DatasetError(f"{shown}: {str(error.args[0]).partition(' in tar file')[0]}; repack the tar") from None
    for member in without_extension:
        path = f"{job.file}/{member.name}"
        yield Row(job.file, path, member.offset, member.size, "", reason="its name has no extension")


def _samples_of_key(
    job: ScanJob, key: str, parts: dict[str, Member], facts: Facts
) -> Iterator[tuple[str, dict[str, Member]]]:
    """The samples among the members that share a key.

    webdataset's key ends at the first dot of a name. If no member is then called just `jpg`, the names have more dots
    (`IMG.1.jpg`, `IMG.1.cls`, `IMG.2.jpg`): the key ends at the last dot if every such key has an image. Other readers
    of adopted shards know only webdataset's rule.
    """
    if not job.adopt and job.options.image_field is None and not any(name in parts for name in IMAGE_EXTENSIONS):
        by_stem: dict[str, dict[str, Member]] = {}
        for extension, member in parts.items():
            stem, _, last = extension.rpartition(".")
            by_stem.setdefault(stem, {})[last] = member
        if all(any(name in own for name in IMAGE_EXTENSIONS) for own in by_stem.values()):
            if len(by_stem) > 1:
                facts.choose(_DOTS, f"{job.file}/{key} ({', '.join(list(parts)[:4])})")
            yield from ((f"{key}.{stem}", own) for stem, own in by_stem.items())
            return
    yield key, parts


def image_extension(extensions: Collection[str], field: str | None = None, exact: bool = False) -> str | None:
    """Which of a sample's `extensions` is the image: `field`, if the user names it; else the first of
    `IMAGE_EXTENSIONS`; else, unless `exact`, the only one that ends in one of them (`rgb.jpg`)."""
    if field is not None:
        return field if field in extensions else None
    if (found := next((name for name in IMAGE_EXTENSIONS if name in extensions), None)) is not None or exact:
        return found
    images = images_among(extensions)
    return images[0] if len(images) == 1 else None


def images_among(extensions: Collection[str]) -> list[str]:
    """Those of `extensions` that end in an image's (`jpg`, `seg.png`)."""
    return [name for name in extensions if name.rpartition(".")[2] in IMAGE_EXTENSIONS]


def _sample_row(job: ScanJob, file: BinaryIO, key: str, parts: dict[str, Member], facts: Facts) -> Row:
    options = job.options
    wanted = None if options.image_field is None else options.image_field.lower().lstrip(".")
    chosen, images = image_extension(parts, wanted, exact=job.adopt), images_among(parts)
    if chosen is None:
        listed = ", ".join(sorted(parts)[:6]) + (", ..." if len(parts) > 6 else "")
        advice = f"; --image-field {images[0]} takes that one" if images else ""
        reason = f"no {wanted or 'image'} in this sample, only {listed}{advice}"
        return Row(job.file, f"{job.file}/{key}", 0, 0, "", reason=reason)
    if len(images) > 1 and wanted is None:
        facts.choose(_SEVERAL, f"{job.file}/{key} ({', '.join(images[:4])}: {chosen} is taken)")
    facts.only_images &= len(images) == len(parts)
    image = parts[chosen]
    row = Row(job.file, f"{job.file}/{image.name}", image.offset, image.size, "")
    if not options.labels:
        return row
    field = options.label_field
    text = "cls" if field is None else field.lower().lstrip(".")
    try:
        if text in parts and text != "json":
            facts.field_found = True
            label = cls_label(_read(file, parts[text]))
            row = row._replace(label=label)
            # Other readers of adopted shards look for labels in `.cls` only.
            return row._replace(label_offset=parts[text].offset, label_size=parts[text].size) if text == "cls" else row
        if "json" in parts:
            label = json_label(_read(file, parts["json"]), field)
            facts.field_found |= label != ""
            return row._replace(label=label)
        return row
    except ValueError as error:
        return row._replace(reason=f"its label cannot be read ({error})")


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
