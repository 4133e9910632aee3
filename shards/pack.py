"""Packs a dataset: workers scan the sources and build the planned shards; then the index and side files are written.

Every step leaves its result in the build's work folder inside the destination. A build that was stopped at any
moment, even by SIGKILL, resumes from there and gives the same bytes. `dataset.json` is written last: if it exists, the
dataset is complete. Several machines may share a build (`part`); the one that finds all shards built finishes it.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.fs import FileType

from maelstream.shards.build_jobs import Build, ScanJob, ShardJob
from maelstream.shards.class_tars import classes_in_tars, label_by_folder
from maelstream.shards.dataset import MANIFEST_NAME, read_manifest
from maelstream.shards.errors import DatasetError
from maelstream.shards.executors import Executor
from maelstream.shards.finish import finish, nothing_usable_message, strict_message
from maelstream.shards.inspect import Conversion
from maelstream.shards.labels import first_difference
from maelstream.shards.layout import FolderClasses
from maelstream.shards.plan import PLAN, PackOptions, Plan, Sharding, per_file_sharding, shuffled_sharding, write_plan
from maelstream.shards.scan_output import Facts, read_facts, read_rows
from maelstream.shards.sources import Sources, find_sources
from maelstream.shards.storage import WORK, Storage

_CLAIM = f"{WORK}/claim"


class Progress(NamedTuple):
    """What a build reports after each step."""

    step: str
    """`scan` for a scanned source, `shard` for a built shard."""
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


class Notice(str):
    """A choice that a build made or files that it left out, which the user should hear of; one line."""


Report = Callable[[Progress | Notice], None]


class PackResult(NamedTuple):
    """Result of one call; samples and quarantined are 0 while shards are missing."""

    samples: int
    quarantined: int
    shards: int
    """All shards of the dataset."""
    built: int
    """Shards that this call built; the others existed already."""
    missing: int
    """Shards that other parts have not built yet; 0 if the dataset is complete."""


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

    `classes` are names by label, for sources whose labels are numbers. `part` (i, n) builds every n-th shard from the
    i-th (1 to n). With `strict`, an unusable image is an error.

    Raises:
        DatasetError: sources are missing or damaged, or the destination holds something else or cannot be written.
    """
    folder = Storage.at(destination)
    sources = find_sources(source, options.split, classes, options.labels)
    if sources.searched is not None and f"{folder.path}/".startswith(f"{sources.searched.path}/"):
        raise DatasetError(f"{folder} is inside {source}, whose folders are classes; choose another DST")
    if sources.kind in ("folders", "listed") and (options.image_field or options.label_field):
        raise DatasetError(f"{source} holds files of one image each; --image-field and --label-field are for others")
    if sources.classes is None and options.labels:  # the source may be a packed dataset
        manifest = read_manifest(sources.storage)
        sources = replace(sources, classes=None if manifest is None else manifest["classes"])
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
        DatasetError: as `pack`; or the folder holds shards of several splits, and a dataset is one split.
    """
    storage = Storage.at(folder)
    if options.image_field is not None and re.search(r"\s", options.image_field):
        raise DatasetError(f"--image-field {options.image_field}: DALI cannot read extensions with spaces; use pack")
    tars = {entry.name for entry in storage.entries() if entry.name.endswith(".tar")}
    sources = find_sources(folder, options.split, classes, options.labels)
    if sources.kind == "tars" and sources.searched is not None:
        raise DatasetError(
            f"{folder} has its tars in folders; index each of them, such as {sources.storage}, or pack them"
        )
    if sources.kind != "tars" or sources.storage.path != storage.path:
        raise DatasetError(f"{folder} holds no tar shards; `maelstream pack SRC DST` makes them")
    if others := sorted(tars - set(sources.files["path"].to_pylist())):
        raise DatasetError(
            f"{folder} also holds shards of other splits ({others[0]}); a dataset is one split, so move them into "
            "a folder of their own"
        )
    return _run(Build(sources, storage, options, adopt=True), executor, report, (1, 1), strict)


def _run(build: Build, executor: Executor, report: Report, part: tuple[int, int], strict: bool) -> PackResult:
    destination, built, missing = build.destination, 0, 0
    if not _claim_destination(build):
        try:
            built, missing = _build_missing(build, executor, report, part, strict)
        except (DatasetError, OSError):
            if not destination.has(MANIFEST_NAME):  # otherwise another part has finished the dataset meanwhile
                raise
    if missing and not destination.has(MANIFEST_NAME):
        return PackResult(0, 0, len(Plan.open(destination)), built, missing)
    destination.remove_work()
    manifest = json.loads(destination.read(MANIFEST_NAME))
    return PackResult(manifest["samples"], manifest["quarantined"], len(manifest["shards"]), built, 0)


def _build_missing(
    build: Build, executor: Executor, report: Report, part: tuple[int, int], strict: bool
) -> tuple[int, int]:
    """Does all work that is left; returns the numbers of shards built now and of shards left to other parts."""
    destination = build.destination
    if not destination.has(PLAN):
        _scan_and_plan(build, executor, report, part)
    plan = Plan.open(destination)
    jobs = _shard_jobs(build, len(plan))
    if not any(plan.shard_bytes):
        raise DatasetError(nothing_usable_message(plan.quarantine))
    for notice in plan.notices:
        report(Notice(notice))
    if strict and plan.quarantine:
        raise DatasetError(strict_message(plan.quarantine))
    missing = [job for job in _unfinished(jobs, destination) if job.number % part[1] == part[0] - 1]
    total_bytes = sum(plan.shard_bytes[job.number] for job in missing)
    with closing(executor.run("maelstream.shards.build:build", missing)) as built:
        for count, (number, receipt) in enumerate(built, 1):
            if strict and receipt.quarantine:
                raise DatasetError(strict_message(receipt.quarantine))
            numbers = receipt.samples, len(receipt.quarantine), plan.shard_bytes[number], total_bytes
            report(Progress("shard", count, len(missing), jobs[number].name, *numbers))
    unfinished = _unfinished(jobs, destination)
    if not unfinished:
        finish(build, plan, jobs, strict)
    return len(missing), len(unfinished)


def _claim_destination(build: Build) -> bool:
    """Claims the destination for this build, or checks the claim; returns whether the dataset is complete already.

    Raises:
        DatasetError: the destination is a file, or holds another dataset or build.
    """
    destination = build.destination
    if destination.kind() == FileType.File:
        raise DatasetError(f"{destination} is a file; DST is a folder")
    present = {entry.name for entry in destination.entries()}
    complete = MANIFEST_NAME in present
    if complete:
        manifest = read_manifest(destination)
        if manifest is None and build.adopt:
            raise DatasetError(
                f"{destination}/{MANIFEST_NAME} is no packed dataset's; rename it, because `maelstream index` writes a "
                "file of this name"
            )
        fingerprint = None if manifest is None else manifest["plan"]
    elif destination.has(_CLAIM):
        fingerprint = destination.read(_CLAIM).decode()
    elif present - {WORK} and not build.adopt:
        fingerprint = None
    else:
        fingerprint = build.fingerprint
        destination.make()
        with destination.atomic_write(_CLAIM) as file:
            file.write(fingerprint.encode())
    if fingerprint != build.fingerprint and build.adopt:
        raise DatasetError(
            f"{destination} has a {MANIFEST_NAME} or an unfinished build of other shards or options; remove "
            f"{MANIFEST_NAME if complete else WORK} to index the tars as they are now"
        )
    if fingerprint != build.fingerprint:
        raise DatasetError(
            f"{destination} holds something else: another dataset, other options, or a source that has changed since; "
            "choose another DST or empty this one"
        )
    return complete


def _scan_and_plan(build: Build, executor: Executor, report: Report, part: tuple[int, int]) -> None:
    sources, options = build.sources, build.options
    if build.adopt:
        sharding = per_file_sharding(sources.files["path"].to_pylist())
    else:
        sharding = shuffled_sharding(options.seed, options.shard_bytes)
    if sources.kind in ("folders", "listed"):
        rows, named = _rows_of_images(sources.files), sources.kind == "folders"
        write_plan(build.destination, rows, sources.classes, named, sharding, list(sources.notices))
        return
    files = list(zip(sources.files["path"].to_pylist(), sources.files["size"].to_pylist(), strict=True))
    jobs = [
        ScanJob(sources.storage, build.destination, number, name, options, build.adopt, sources.ground_truth)
        for number, (name, _) in enumerate(files)
    ]
    work = build.destination.names(WORK)
    missing = [job for job in jobs if not job.done(work)]
    # Each part starts at another file, and skips the files that other parts have scanned by then.
    first = len(missing) * (part[0] - 1) // part[1]
    missing = missing[first:] + missing[:first]
    total_bytes = sum(files[job.number][1] for job in missing)
    with closing(executor.run("maelstream.shards.scan:scan", missing)) as scanned:
        for count, (number, samples) in enumerate(scanned, 1):
            name, size = files[number]
            report(Progress("scan", count, len(missing), name, samples, 0, size, total_bytes))
    _plan_of_scans(build, [pa.ipc.open_file(build.destination.open(job.output)) for job in jobs], sharding)


def _plan_of_scans(build: Build, scans: list[pa.ipc.RecordBatchFileReader], sharding: Sharding) -> None:
    """Writes the plan of all scanned files."""
    sources, options = build.sources, build.options
    facts = [read_facts(scan) for scan in scans]
    if options.label_field and not any(fact.field_found for fact in facts):
        raise DatasetError(
            f"{sources.storage}: no sample has a label in {options.label_field}, which --label-field names; correct "
            "it, or pack without labels (--no-labels)"
        )
    tables, named = read_rows(scans), any(fact.named for fact in facts)
    classes = sources.classes or _classes_of_files(sources, facts)
    notices = [*sources.notices, *_choices(facts)]
    if options.labels and not named and facts and all(fact.only_images for fact in facts):
        shown = f"{sources.storage}/{sources.files['path'][0]}"
        if (found := classes_in_tars(read_rows(scans), options.split, shown)) is not None:
            if build.adopt and found.splits:
                raise DatasetError(f"{shown} holds folders of several splits; pack it with --split")
            tables, named, classes = label_by_folder(tables, found), True, classes or found.classes
            notices += _notices_of_folders(shown, found)
    write_plan(build.destination, tables, classes, named, sharding, notices)


def _notices_of_folders(shown: str, found: FolderClasses) -> list[str]:
    notices = []
    if found.beside:
        notices.append(
            f"{shown}: beside the splits, {', '.join(found.beside[:3])} ({len(found.beside)} in all) left out"
        )
    if found.classes:
        notices.append(
            f"{shown}: labels are the {len(found.classes):,} folders of the images "
            f"({', '.join(found.classes[:3])}, ...); --no-labels packs without labels"
        )
    return notices


def _choices(facts: list[Facts]) -> list[str]:
    """A line per kind of choice that scans made, with its number and first example."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for fact in facts:
        for kind, (count, example) in fact.choices.items():
            counts[kind] += count
            examples.setdefault(kind, example)
    return [f"{count:,} {kind}, such as {examples[kind]}" for kind, count in counts.items()]


def _classes_of_files(sources: Sources, facts: list[Facts]) -> list[str] | None:
    """The class names that all files with names agree on.

    Raises:
        DatasetError: two files differ.
    """
    names = sources.files["path"].to_pylist()
    having = [(name, fact.classes) for name, fact in zip(names, facts, strict=True) if fact.classes]
    for name, classes in having:
        if difference := first_difference(having[0][1], classes):
            raise DatasetError(
                f"{sources.storage}: the class names of {having[0][0]} and {name} differ: {difference}; pack them "
                "apart, or give the names with --classes"
            )
    return having[0][1] if having else None


def _rows_of_images(files: pa.Table) -> Iterator[pa.Table]:
    for batch in files.to_batches(max_chunksize=2**16):
        path, size, label = batch.columns
        reason = pc.if_else(size.is_null(), "listed, but missing", "").cast(pa.large_string())
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
        if sources.kind in ("parquet", "arrow"):
            source = destination.inside(WORK)
    conversion = Conversion(options.resize, options.quality or Conversion.quality, options.reencode)
    return [ShardJob(source, destination, number, name, build.adopt, conversion) for number, name in enumerate(names)]


def _unfinished(jobs: list[ShardJob], destination: Storage) -> list[ShardJob]:
    files, work = destination.names(), destination.names(WORK)
    return [job for job in jobs if not job.done(files, work)]
