"""Reads images and labels from a Parquet or Arrow file as Hugging Face's `datasets` writes it.

Neither has random access, so the images are copied, one after another, into a file of the build's work folder.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from maelstream.shards.build_jobs import ScanJob
from maelstream.shards.errors import DatasetError
from maelstream.shards.labels import label_fields, label_text
from maelstream.shards.scan_output import Facts, Row

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
_ROWS = 64  # read at a time
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_SEVERAL = "files with several columns of images or labels; --image-field and --label-field choose others"
_UNREADABLE_NAMES = "files whose class names (metadata `huggingface`) cannot be read; give them with --classes"

Batches = Callable[[list[str]], Iterator[pa.RecordBatch]]
"""Yields the columns that it gets, a few rows at a time."""


def table_rows(job: ScanJob, file: pa.NativeFile, spool: BinaryIO, facts: Facts) -> Iterator[Row]:
    """Yields every row of the table and copies its image to `spool`.

    Raises:
        DatasetError: the file is damaged, or has no column of images, or one of labels that cannot be labels.
    """
    shown = f"{job.source}/{job.file}"
    try:
        schema, batches = _opened(file, parquet=job.file.endswith(".parquet"))
        image, label = _image_column(job, schema, facts), _label_column(job, schema, facts)
        if label is not None:
            facts.classes = _class_names(job, schema, label, facts)
        yield from _rows(job, image, label, batches, spool)
    except (pa.ArrowException, ValueError) as error:
        kind = "a Parquet" if job.file.endswith(".parquet") else "an Arrow"
        raise DatasetError(f"{shown} is damaged or not {kind} file ({_line(error)}); download it again") from None


def _opened(file: pa.NativeFile, parquet: bool) -> tuple[pa.Schema, Batches]:
    if parquet:
        table = pq.ParquetFile(file)
        return table.schema_arrow, lambda columns: table.iter_batches(batch_size=_ROWS, columns=columns)
    if file.read_at(6, 0) == b"ARROW1":
        whole = pa.ipc.open_file(file)
        found = (whole.get_batch(number) for number in range(whole.num_record_batches))
        return whole.schema, lambda columns: _slices(found, columns)
    if file.read_at(8, max(0, file.size() - 8)) != _END_OF_STREAM:  # pyarrow takes the end of the file for it
        raise ValueError("its end is missing")
    stream = pa.ipc.open_stream(file)
    return stream.schema, lambda columns: _slices(stream, columns)


def _slices(batches: Any, columns: list[str]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        chosen = batch.select(columns)
        for start in range(0, len(batch), _ROWS):
            yield chosen.slice(start, _ROWS)


def _rows(job: ScanJob, image: str, label: str | None, batches: Batches, spool: BinaryIO) -> Iterator[Row]:
    number = offset = 0
    for batch in batches([image] + ([label] if label else [])):
        labels = batch.column(label).to_pylist() if label else [None] * len(batch)
        for found, value in zip(batch.column(image).to_pylist(), labels, strict=True):
            data, name = (found["bytes"], found.get("path")) if isinstance(found, dict) else (found, None)
            path = f"{job.file}/{number}" + (f"/{name}" if name else "")
            row = Row(job.spool.rpartition("/")[2], path, offset, len(data or b""), "")
            if not data:
                yield row._replace(reason="no bytes in this row")
            else:
                try:
                    yield row._replace(label=label_text(value))
                except ValueError as error:
                    yield row._replace(reason=f"its label cannot be read ({error})")
            offset += spool.write(data or b"")
            number += 1


def _image_column(job: ScanJob, schema: pa.Schema, facts: Facts) -> str:
    matching = [field.name for field in schema if _holds_bytes(field.type)]
    if (wanted := job.options.image_field) is not None:
        if wanted not in matching:
            raise DatasetError(
                f"{job.source}/{job.file}: --image-field {wanted} is no column of images; such are "
                f"{', '.join(matching) or 'none'} of {', '.join(schema.names)}"
            )
        return wanted
    found = [name for name in _IMAGE_COLUMNS if name in matching] or matching
    if not found or (len(found) > 1 and found == matching):
        raise DatasetError(
            f"{job.source}/{job.file}: which column holds the image? It has {', '.join(schema.names)}; choose by "
            "--image-field"
        )
    if len(matching) > 1:
        facts.choose(_SEVERAL, f"{job.file} ({', '.join(matching)}: {found[0]} is taken)")
    return found[0]


def _label_column(job: ScanJob, schema: pa.Schema, facts: Facts) -> str | None:
    if not job.options.labels:
        return None
    wanted = job.options.label_field
    found = [name for name in label_fields(wanted) if name in schema.names]
    if wanted is not None and not found:
        raise DatasetError(f"{job.source}/{job.file} has no column {wanted}, only {', '.join(schema.names)}")
    if not found:
        return None
    if not _holds_labels(kind := schema.field(found[0]).type):
        raise DatasetError(
            f"{job.source}/{job.file}: column {found[0]} ({kind}) holds no labels, which are numbers or names; choose "
            "another by --label-field, or pack without labels (--no-labels)"
        )
    if len(found) > 1:
        facts.choose(_SEVERAL, f"{job.file} ({', '.join(found)}: {found[0]} is taken)")
    facts.field_found = True
    return found[0]


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_labels(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_labels(kind.value_type)
    tests = ("integer", "floating", "decimal", "boolean", "string", "large_string", "null")
    return any(getattr(pa.types, f"is_{test}")(kind) for test in tests)


def _class_names(job: ScanJob, schema: pa.Schema, label: str, facts: Facts) -> list[str] | None:
    """Class names that `datasets` wrote into the schema's metadata or, for a saved dataset, next to the file."""
    text = (schema.metadata or {}).get(b"huggingface")
    folder = job.file.rpartition("/")[0]
    saved = f"{folder}/dataset_info.json".lstrip("/")
    if text is None and job.file.endswith(".arrow") and job.source.has(saved):
        text = b'{"info": %s}' % job.source.read(saved)
    if text is None:
        return None
    try:
        features = json.loads(text)["info"]["features"]
        if isinstance(features, list):  # as in a dataset card
            features = {feature["name"]: feature for feature in features}
        return _names_in(features.get(label))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        facts.choose(_UNREADABLE_NAMES, job.file)
        return None


def _names_in(feature: Any) -> list[str] | None:
    """The names of a feature: a ClassLabel, or a list of one."""
    if isinstance(feature, list) and feature:
        return _names_in(feature[0])
    if not isinstance(feature, dict):
        return None
    if isinstance(names := feature.get("names"), dict):  # {"0": "cat", "1": "dog"}
        return [str(names[number]) for number in sorted(names, key=int)]
    if isinstance(names, list):
        return [str(name) for name in names]
    inner = (feature[key] for key in ("class_label", "dtype", "feature", "sequence", "list") if key in feature)
    return _names_in(next(inner, None))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
