"""Finishes a build: merges the shards' receipts into the index, the side files and the manifest."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version

import pyarrow as pa

from maelstream.shards.build_jobs import Build, Receipt, ShardJob
from maelstream.shards.dataset import FORMAT_VERSION, INFO_NAME, MANIFEST_NAME, QUARANTINE_NAME, with_checksum
from maelstream.shards.errors import DatasetError
from maelstream.shards.index import INDEX_NAME, SCHEMA, write_one_batch
from maelstream.shards.plan import Plan, is_about_label


def nothing_usable_message(quarantine: list[dict[str, str]]) -> str:
    """The error message for a build without a usable image."""
    first = f"; the first, {quarantine[0]['source']}: {quarantine[0]['reason']}" if quarantine else ""
    advice = "; --no-labels packs without labels" if quarantine and is_about_label(quarantine[0]["reason"]) else ""
    return f"none of {len(quarantine):,} files is a usable image{first}{advice}"


def strict_message(quarantine: list[dict[str, str]]) -> str:
    """The error message of --strict for the first unusable image."""
    source, reason = quarantine[0]["source"], quarantine[0]["reason"]
    return f"--strict: {source} is unusable ({reason}); repair or remove it, or omit --strict"


def finish(build: Build, plan: Plan, jobs: list[ShardJob], strict: bool) -> None:
    """Merges the receipts into the index, the side files and the manifest, which is written last.

    Raises:
        DatasetError: no image is usable, or one is not and `strict` is set.
    """
    destination, options = build.destination, build.options
    receipts: list[Receipt] = []

    def rows() -> Iterator[pa.Table]:
        for job in jobs:
            receipt, table = Receipt.read(destination, job.receipt)
            receipts.append(receipt)
            yield table

    with destination.scratch() as scratch, destination.atomic_write(INDEX_NAME) as file:
        samples = write_one_batch(file, SCHEMA, rows(), scratch)
    quarantine = plan.quarantine + [line for receipt in receipts for line in receipt.quarantine]
    quarantine.sort(key=lambda line: line["source"])
    if strict and quarantine:
        raise DatasetError(strict_message(quarantine))
    if not samples:
        raise DatasetError(nothing_usable_message(quarantine))
    with destination.atomic_write(QUARANTINE_NAME) as file:
        file.writelines((json.dumps(line) + "\n").encode() for line in quarantine)
    shards = [
        {"name": job.name, "samples": receipt.samples, "bytes": receipt.bytes, "sha256": receipt.sha256}
        for job, receipt in zip(jobs, receipts, strict=True)
    ]
    # The publisher's own description of adopted shards is kept.
    if not (build.adopt and destination.has(INFO_NAME)):
        with destination.atomic_write(INFO_NAME) as file:  # timm's and webdataset's description of a split
            split = {
                "name": options.split,
                "filenames": [shard["name"] for shard in shards],
                "shard_lengths": [shard["samples"] for shard in shards],
                "num_samples": samples,
            }
            file.write(json.dumps({"splits": {options.split: split}}, indent=1).encode())
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": options.name,
        "split": options.split,
        "samples": samples,
        "quarantined": len(quarantine),
        "formats": dict(sorted(sum((Counter(receipt.formats) for receipt in receipts), Counter()).items())),
        "classes": plan.classes,
        "shards": shards,
        "adopted": build.adopt,
        "options": asdict(options),
        "packer": {"maelstream": version("maelstream"), "pillow": version("pillow")},
        "dali_checked": True,
        "plan": build.fingerprint,
        "side_files": {
            name: destination.sha256(name)
            for name in [INDEX_NAME, INFO_NAME, QUARANTINE_NAME, *(job.dali_index for job in jobs)]
        },
    }
    with destination.atomic_write(MANIFEST_NAME) as file:
        file.write(json.dumps(with_checksum(manifest), indent=1).encode())
