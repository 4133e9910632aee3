"""The builder: sources are scanned, planned, and built into shards by workers; then come the index and the side files.

Every step leaves its result in the build's work folder inside the destination, so that a build which was stopped at
any moment, even by SIGKILL, resumes from there to the same bytes. `dataset.json` is written last: if it exists, the
dataset is complete. Several machines may share a build (`part`); the one that finds all shards done writes the rest.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.fs import FileType

from maelstream.shards.build_jobs import Build, ScanJob, ShardJob
from maelstream.shards.dataset import MANIFEST_NAME
from maelstream.shards.errors import DatasetError
from maelstream.shards.executors import Executor
from maelstream.shards.finish import finish, nothing_usable_message, strict_message
from maelstream.shards.plan import PLAN, PackOptions, Plan, as_found, shuffled, write_plan
from maelstream.shards.sources import find_sources
from maelstream.shards.storage import WORK, Storage

_CLAIM = f"{WORK}/claim"
_JPEG_QUALITY = 90


class Progress(NamedTuple):
    """What a build reports after each step."""

    step: str
    """`scan` for a source that was looked through, `shard` for a shard that was built."""
    done: int
    """Steps of this kind that this call has done."""
    total: int
    """Steps of this kind that this call has to do."""
    name: str
    """File name."""
    samples: int
    quarantined: int
    bytes: int
    """Bytes of the shard's source images, or of the scanned source."""
    total_bytes: int
    """`bytes` of all steps of this kind that this call has to do."""


Report = Callable[[Progress], None]


class PackResult(NamedTuple):
    samples: int
    quarantined: int
    shards: int
    """All shards of the dataset."""
    built: int
    """Shards that this call built; the others were there."""
    missing: int
    """Shards that other parts have yet to build; 0 when the dataset is whole."""


def pack(
    source: str,
    destination: str,
    options: PackOptions,
    executor: Executor,
    report: Report,
    classes: list[str] | None = None,
    part: tuple[int, int] = (1, 1),
    strict: bool = False,
) -> PackResult:
    """Packs the images of `source` into `destination`; resumes an earlier call that was stopped.

    `classes` are names by label, where sources have numbers alone. `part` (i, n) builds every n-th shard, from the i-th
    (1 to n). With `strict` anything that cannot enter is an error.

    Raises:
        DatasetError: sources that are none or damaged, a destination that holds something else or cannot be written.
    """
    folder = Storage.at(destination)
    sources = find_sources(source, options.split, classes)
    if sources.kind == "folders" and f"{folder.path}/".startswith(f"{sources.storage.path}/"):
        raise DatasetError(f"{folder} lies in {source}, whose folders are classes; choose another DST")
    if sources.classes is None and MANIFEST_NAME in sources.storage.names():  # it is a packed dataset
        sources = replace(sources, classes=json.loads(sources.storage.read(MANIFEST_NAME))["classes"])
    return _run(Build(sources, folder, options, adopt=False), executor, report, part, strict)


def index(
    folder: str,
    options: PackOptions,
    executor: Executor,
    report: Report,
    classes: list[str] | None = None,
    strict: bool = False,
) -> PackResult:
    """Adopts the tar shards in `folder`: writes an index and side files there and leaves the tars unchanged.

    Raises:
        DatasetError: as `pack`; or shards of several splits, which a dataset cannot hold.
    """
    storage = Storage.at(folder)
    tars = {entry.name for entry in storage.entries() if entry.name.endswith(".tar")}
    sources = find_sources(folder, options.split, classes)
    if sources.kind != "tars" or sources.storage.path != storage.path:
        raise DatasetError(f"{folder} holds no tar shards; `maelstream pack SRC DST` makes some")
    if others := sorted(tars - set(sources.files["path"].to_pylist())):
        raise DatasetError(
            f"{folder} holds shards of other splits, too ({others[0]}); a dataset is one split, so move them into "
            "a folder of their own"
        )
    return _run(Build(sources, storage, options, adopt=True), executor, report, (1, 1), strict)


def _run(build: Build, executor: Executor, report: Report, part: tuple[int, int], strict: bool) -> PackResult:
    destination, built, missing = build.destination, 0, 0
    if not _claimed(build):
        try:
            built, missing = _carry_out(build, executor, report, part, strict)
        except (DatasetError, OSError):
            if not destination.has(MANIFEST_NAME):  # or else another part has finished it meanwhile
                raise
    if missing and not destination.has(MANIFEST_NAME):
        return PackResult(0, 0, len(Plan.open(destination)), built, missing)
    destination.remove_work()
    manifest = json.loads(destination.read(MANIFEST_NAME))
    return PackResult(manifest["samples"], manifest["quarantined"], len(manifest["shards"]), built, 0)


def _carry_out(
    build: Build, executor: Executor, report: Report, part: tuple[int, int], strict: bool
) -> tuple[int, int]:
    """Everything that is not done yet; how many shards were built, and how many are left to other parts."""
    destination = build.destination
    if not destination.has(PLAN):
        _scan_and_plan(build, executor, report, part)
    plan = Plan.open(destination)
    jobs = _shard_jobs(build, len(plan))
    if not any(plan.shard_bytes):
        raise DatasetError(nothing_usable_message(plan.left_out))
    if strict and plan.left_out:
        raise DatasetError(strict_message(plan.left_out))
    missing = [job for job in _undone(jobs, destination) if job.number % part[1] == part[0] - 1]
    total_bytes = sum(plan.shard_bytes[job.number] for job in missing)
    with closing(executor.run("maelstream.shards.build:build", missing)) as built:
        for count, (number, receipt) in enumerate(built, 1):
            if strict and receipt.quarantine:
                raise DatasetError(strict_message(receipt.quarantine))
            numbers = receipt.samples, len(receipt.quarantine), plan.shard_bytes[number], total_bytes
            report(Progress("shard", count, len(missing), jobs[number].name, *numbers))
    undone = _undone(jobs, destination)
    if not undone:
        finish(build, plan, jobs, strict)
    return len(missing), len(undone)


def _claimed(build: Build) -> bool:
    """Takes the destination for this build, or checks that it is this build's; whether the dataset is whole already."""
    destination = build.destination
    if destination.kind() == FileType.File:
        raise DatasetError(f"{destination} is a file; DST is a folder")
    present = {entry.name for entry in destination.entries()}
    whole = MANIFEST_NAME in present
    if whole:
        held = json.loads(destination.read(MANIFEST_NAME)).get("plan")
    elif destination.has(_CLAIM):
        held = destination.read(_CLAIM).decode()
    elif present - {WORK} and not build.adopt:
        held = None
    else:
        held = build.fingerprint
        destination.make()
        with destination.written_whole(_CLAIM) as file:
            file.write(held.encode())
    if held != build.fingerprint and build.adopt:
        raise DatasetError(
            f"{destination} has a {MANIFEST_NAME} or an unfinished build of other shards or options; remove "
            f"{MANIFEST_NAME if whole else WORK} to index the tars as they are now"
        )
    if held != build.fingerprint:
        raise DatasetError(
            f"{destination} holds something else: another dataset, other options, or a source that has changed since; "
            "choose another DST or empty this one"
        )
    return whole


def _scan_and_plan(build: Build, executor: Executor, report: Report, part: tuple[int, int]) -> None:
    sources, options = build.sources, build.options
    cut = as_found(sources.files["path"].to_pylist()) if build.adopt else shuffled(options.seed, options.shard_bytes)
    if sources.kind in ("folders", "listed"):
        write_plan(build.destination, _rows_of_images(sources.files), sources.classes, sources.kind == "folders", cut)
        return
    files = list(zip(sources.files["path"].to_pylist(), sources.files["size"].to_pylist(), strict=True))
    jobs = [
        ScanJob(sources.storage, build.destination, number, name, options.label_field, sources.ground_truth)
        for number, (name, _) in enumerate(files)
    ]
    work = build.destination.names(WORK)
    missing = [job for job in jobs if not job.done(work)]
    # Each part begins with files of its own, and passes over what others have done by then.
    first = len(missing) * (part[0] - 1) // part[1]
    missing = missing[first:] + missing[:first]
    total_bytes = sum(files[job.number][1] for job in missing)
    with closing(executor.run("maelstream.shards.scan:scan", missing)) as scanned:
        for count, (number, rows) in enumerate(scanned, 1):
            name, size = files[number]
            report(Progress("scan", count, len(missing), name, rows, 0, size, total_bytes))
    found = [pa.ipc.open_file(build.destination.open(job.output)) for job in jobs]
    facts = [json.loads(file.schema.metadata[b"facts"]) for file in found]
    classes = sources.classes or next((fact["classes"] for fact in facts if fact["classes"]), None)
    tables = (
        pa.Table.from_batches([file.get_batch(number)]) for file in found for number in range(file.num_record_batches)
    )
    write_plan(build.destination, tables, classes, any(fact["named"] for fact in facts), cut)


def _rows_of_images(files: pa.Table) -> Iterator[pa.Table]:
    for batch in files.to_batches(max_chunksize=2**16):
        path, size, label = batch.columns
        reason = pc.if_else(size.is_null(), "listed, but not there", "").cast(pa.large_string())
        zeros = pa.array([0] * len(batch), pa.uint64())
        names = ["file", "path", "offset", "size", "label", "label_offset", "label_size", "reason"]
        yield pa.table([path, path, zeros, size.fill_null(0), label, zeros, zeros, reason], names=names)


def _shard_jobs(build: Build, count: int) -> list[ShardJob]:
    sources, options, destination = build.sources, build.options, build.destination
    source = sources.storage
    if build.adopt:
        names = sources.files["path"].to_pylist()
    else:
        names = [f"{options.name}-{options.split}-{number:06d}.tar" for number in range(count)]
        if sources.kind == "parquet":
            source = destination.inside(WORK)
    quality = options.quality or _JPEG_QUALITY
    return [
        ShardJob(source, destination, number, name, build.adopt, options.resize, quality)
        for number, name in enumerate(names)
    ]


def _undone(jobs: list[ShardJob], destination: Storage) -> list[ShardJob]:
    files, work = destination.names(), destination.names(WORK)
    return [job for job in jobs if not job.done(files, work)]
