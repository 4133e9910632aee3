"""The builder: a plan's samples, each decoded in full first, into tar shards and their side files.

A shard is built by `build_shard`, whoever calls it, to the same bytes. Its receipt, written after the shard itself,
holds what the index needs of it; a build that is started again keeps every shard that has one. `dataset.json` is
written last: where it stands, the dataset is whole.
"""

import hashlib
import json
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import pyarrow as pa
import webdataset

from shards.dataset import FORMAT_VERSION, INFO_NAME, MANIFEST_NAME, QUARANTINE_NAME, sealed
from shards.durable import written_whole
from shards.errors import DatasetError
from shards.index import INDEX_NAME, SCHEMA, write_index
from shards.inspect import Unfit, inspect
from shards.plan import PackOptions, Plan, make_plan
from shards.sources import Source, find_sources

_RECEIPTS = ".pack"
_PLAN = "plan.sha256"


@dataclass(frozen=True)
class ShardJob:
    """All that a worker needs to build one shard."""

    root: Path
    destination: Path
    number: int
    name: str
    first_key: int
    sources: list[Source]

    @property
    def receipt(self) -> Path:
        return self.destination / _RECEIPTS / f"{self.number:06d}.json"

    @property
    def done(self) -> bool:
        """Whether an earlier call finished the shard, and nobody took it away since."""
        shard = self.destination / self.name
        return self.receipt.exists() and shard.exists() and shard.with_suffix(".idx").exists()


@dataclass(frozen=True)
class PackResult:
    samples: int
    quarantined: int
    shards: int
    """All shards of the dataset."""
    built: int
    """Shards that this call built; the others were there."""


def pack(
    source: Path, destination: Path, options: PackOptions, workers: int, on_shard: Callable[[int, int, int], None]
) -> PackResult:
    """Packs the images of `source` into `destination`; goes on where an earlier call was stopped.

    `on_shard` is called with (samples packed, samples quarantined, bytes written) of each shard that gets finished.

    Raises:
        DatasetError: sources without an image, a destination that holds something else, an unwritable disk.
    """
    tree = find_sources(source)
    plan = make_plan(tree, options)
    _claim(destination, plan)
    jobs = [
        ShardJob(source, destination, number, plan.shard_name(number), first_key, sources)
        for number, (first_key, sources) in enumerate(zip(plan.first_keys, plan.shards, strict=True))
    ]
    finished = (destination / MANIFEST_NAME).exists()
    missing = [] if finished else [job for job in jobs if not job.done]
    # Spawned, not forked: the caller may hold threads.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(build_shard, job) for job in missing]):
            try:
                receipt = future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            on_shard(len(receipt["rows"]["key"]), len(receipt["quarantine"]), receipt["bytes"])
    if not finished:
        _finish(plan, tree.others, jobs)
    manifest = json.loads((destination / MANIFEST_NAME).read_text())
    return PackResult(manifest["samples"], manifest["quarantined"], len(jobs), len(missing))


def build_shard(job: ShardJob) -> dict[str, Any]:
    """Writes the shard and its receipt, which is returned: size, SHA-256, index rows, what was left out."""
    rows: dict[str, list] = {name: [] for name in SCHEMA.names}
    quarantine: list[dict[str, str]] = []
    formats: Counter[str] = Counter()
    dali_index: list[str] = []
    with written_whole(job.destination / job.name) as file:
        hashed = _HashedFile(file)
        # USTAR, mtime 0 and no owner: the same bytes whoever writes them.
        writer = webdataset.TarWriter(hashed, user="", group="", mode=0o644, compress=False, encoder=False, mtime=0)
        for place, source in enumerate(job.sources):
            data = _read(job.root / source.path)
            try:
                info = inspect(data)
            except Unfit as reason:
                quarantine.append({"source": source.path, "reason": str(reason)})
                continue
            key, label = f"{job.first_key + place:09d}", str(source.label).encode()
            offset = _write_member(writer, key, info.extension, data)
            label_offset = _write_member(writer, key, "cls", label)
            formats[info.extension] += 1
            dali_index.append(
                f"{info.extension} {offset} {len(data)} {key}.{info.extension} "
                f"cls {label_offset} {len(label)} {key}.cls"
            )
            row = (
                job.number,
                offset,
                len(data),
                info.width,
                info.height,
                source.label,
                google_crc32c.value(data),
                key,
                source.path,
            )
            for name, value in zip(SCHEMA.names, row, strict=True):
                rows[name].append(value)
        writer.close()
    with written_whole((job.destination / job.name).with_suffix(".idx")) as file:
        file.write("\n".join([f"v1.2 {len(dali_index)}", *dali_index, ""]).encode())
    receipt = {
        "bytes": hashed.size,
        "sha256": hashed.sha256.hexdigest(),
        "formats": formats,
        "rows": rows,
        "quarantine": quarantine,
    }
    with written_whole(job.receipt) as file:
        file.write(json.dumps(receipt).encode())
    return receipt


class _HashedFile:
    """Hashes and counts what passes through, so that a finished shard need not be read again."""

    def __init__(self, file: BinaryIO):
        self._file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        if self._file.closed:  # the disk was full: tarfile still writes its end when it is garbage-collected
            return len(data)
        self.sha256.update(data)
        self.size += len(data)
        return self._file.write(data)


def _write_member(writer: webdataset.TarWriter, key: str, extension: str, data: bytes) -> int:
    """Offset of the member's data: behind its header, which is one block of 512 bytes in USTAR."""
    start = writer.tarstream.offset
    writer.write({"__key__": key, extension: data})
    return start + 512


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}); make it readable or remove it") from None


def _claim(destination: Path, plan: Plan) -> None:
    """Makes the folder, or checks that what lies there is the same build."""
    manifest, plan_file = destination / MANIFEST_NAME, destination / _RECEIPTS / _PLAN
    if manifest.exists():
        held = json.loads(manifest.read_text()).get("plan")
    elif plan_file.exists():
        held = plan_file.read_text()
    elif destination.is_file():
        raise DatasetError(f"{destination} is a file; DST is a folder")
    elif destination.exists() and any(entry.name != _RECEIPTS for entry in destination.iterdir()):
        held = None
    else:
        held = plan.fingerprint
        try:
            plan_file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatasetError(f"{destination} cannot be made ({error.strerror}); choose another DST") from None
        with written_whole(plan_file) as file:
            file.write(held.encode())
    if held != plan.fingerprint:
        raise DatasetError(
            f"{destination} holds something else: another dataset, other options, or a source that has changed since; "
            "choose another DST or empty this one"
        )


def _finish(plan: Plan, others: list[str], jobs: list[ShardJob]) -> None:
    """Joins the receipts into the index and the manifest."""
    destination = jobs[0].destination
    for left_behind in destination.glob(".*.writing"):  # by processes that died; no shard is missing any more
        left_behind.unlink()
    receipts = [json.loads(job.receipt.read_text()) for job in jobs]
    rows = pa.concat_tables([pa.table(receipt["rows"], SCHEMA) for receipt in receipts])
    quarantine = [line for receipt in receipts for line in receipt["quarantine"]]
    quarantine += [{"source": path, "reason": "not named as an image is"} for path in others]
    if not len(rows):
        raise DatasetError(f"none of {len(quarantine)} files is a usable image; the first: {quarantine[0]['reason']}")
    with written_whole(destination / QUARANTINE_NAME) as file:
        for line in sorted(quarantine, key=lambda line: line["source"]):
            file.write((json.dumps(line) + "\n").encode())
    with written_whole(destination / INDEX_NAME) as file:
        write_index(file, rows)
    shards = [
        {
            "name": job.name,
            "samples": len(receipt["rows"]["key"]),
            "bytes": receipt["bytes"],
            "sha256": receipt["sha256"],
        }
        for job, receipt in zip(jobs, receipts, strict=True)
    ]
    with written_whole(destination / INFO_NAME) as file:  # timm's and webdataset's description of a split
        split = {
            "name": plan.options.split,
            "filenames": [shard["name"] for shard in shards],
            "shard_lengths": [shard["samples"] for shard in shards],
            "num_samples": len(rows),
        }
        file.write(json.dumps({"splits": {plan.options.split: split}}, indent=1).encode())
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": plan.options.name,
        "split": plan.options.split,
        "samples": len(rows),
        "quarantined": len(quarantine),
        "formats": dict(sum((Counter(receipt["formats"]) for receipt in receipts), Counter())),
        "classes": plan.classes,
        "shards": shards,
        "options": asdict(plan.options),
        "plan": plan.fingerprint,
        "side_files": {
            name: hashlib.sha256((destination / name).read_bytes()).hexdigest()
            for name in [INDEX_NAME, INFO_NAME, QUARANTINE_NAME, *(Path(job.name).stem + ".idx" for job in jobs)]
        },
    }
    with written_whole(destination / MANIFEST_NAME) as file:
        file.write(json.dumps(sealed(manifest), indent=1).encode())
    shutil.rmtree(destination / _RECEIPTS)
