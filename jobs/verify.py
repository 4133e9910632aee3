"""`maelstream verify DST`: lists every fault of a packed dataset, by shard and sample."""

import os
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.progress import Progress

from maelstream.jobs.arguments import parse_arguments
from maelstream.shards.dataset import Dataset
from maelstream.shards.executors import Local
from maelstream.shards.storage import Storage
from maelstream.shards.verify import verify


@dataclass(frozen=True)
class Verify:
    """Check a packed dataset against its checksums; the exit code is 1 if something is wrong."""

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """A packed dataset; a folder, or a URI such as s3://bucket/folder."""
    deep: bool = False
    """Also decode every image, as a run does."""
    workers: int = len(os.sched_getaffinity(0))
    """Number of processes; each verifies one shard at a time."""


def main(args: list[str]) -> int:
    """`maelstream verify`; returns 0 if the dataset is as it was packed, 1 otherwise."""
    command = parse_arguments(Verify, args, "verify")
    dataset = Dataset.open_storage(Storage.at(command.dst), hashed_bytes=0)  # verify compares the checksum
    faults = 0
    with Progress(disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("verifying", total=len(dataset.shard_names))
        for fault in verify(dataset, command.deep, Local(command.workers), lambda: bar.advance(task)):
            print(fault)
            faults += 1
    print(
        f"{dataset.folder}: {len(dataset):,} samples in {len(dataset.shard_names):,} shards, "
        + (f"{faults:,} faults" if faults else "no fault")
    )
    return 1 if faults else 0
