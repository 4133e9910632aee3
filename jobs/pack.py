"""`maelstream pack SRC DST`: images -> tar shards, an index and their side files."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from maelstream.jobs.arguments import parse_arguments
from maelstream.jobs.reporting.progress import PackProgress, interruptible
from maelstream.shards.errors import DatasetError
from maelstream.shards.executors import EXECUTORS, Executor
from maelstream.shards.pack import PackResult, Report, pack
from maelstream.shards.plan import PackOptions
from maelstream.shards.sources import SPLITS
from maelstream.shards.storage import Storage

_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Labels:
    """Where labels come from, and what classes are called."""

    label_field: str | None = None
    """Of each sample's JSON, or the Parquet column, that holds the label; otherwise .cls, or a field named label,
    cls, class, class_id, target, labels or fine_label."""
    classes: Path | None = None
    """A text file of class names, a line a label, for sources whose labels are numbers."""

    def names(self) -> list[str] | None:
        """Of classes, by label; DatasetError when the file cannot be read or names a class twice."""
        if self.classes is None:
            return None
        try:
            names = self.classes.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"--classes {self.classes} cannot be read ({error})") from None
        if not names or len(set(names)) < len(names) or "" in names:
            raise DatasetError(f"--classes {self.classes}: a line a class, none empty, none twice")
        return names


@dataclass(frozen=True)
class Workers:
    """Who does the work."""

    workers: int = len(os.sched_getaffinity(0))
    """Processes, or Ray tasks at a time; each builds a shard at a time."""
    executor: Literal["local", "ray"] = "local"
    """This machine, or the Ray cluster that RAY_ADDRESS names (one on this machine if it is not set)."""
    strict: bool = False
    """End with an error at the first file that cannot enter, instead of listing it in quarantine.jsonl."""

    def make(self) -> Executor:
        """The executor; DatasetError for less than one worker."""
        return EXECUTORS[self.executor](self.workers)


@dataclass(frozen=True)
class Pack:
    """Pack images into tar shards. Started again, it goes on where it stopped.

    SRC is a folder that holds one folder of images a class; or the ILSVRC2012 tars as downloaded, WebDataset shards, or
    Parquet files as Hugging Face stores them: a folder of these, one of them, or a pattern ('train-{0000..1023}.tar');
    or iNaturalist's or Places' lists with their images, or one of the lists. SRC and DST are local or s3:// and gs://
    URIs.
    """

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Images to pack."""
    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """The packed dataset: a new or empty folder, or one that an earlier call did not finish."""
    split: str = "train"
    """Which files of SRC, where it has several splits; and part of the shards' file names."""
    name: str | None = None
    """The other part; by default what SRC is called."""
    shard_size: str = "256MiB"
    """About how many bytes of SRC go into a shard."""
    seed: int = 0
    """The order of samples in the shards depends on it."""
    resize: int | None = None
    """Make images whose short side is longer this short (pixels; bicubic, antialias), encoded again as JPEG.
    Otherwise every byte stays as it is."""
    quality: int | None = None
    """Of the JPEGs that --resize makes, 1 to 100; 90 if not given."""
    part: str = "1/1"
    """I/N builds every N-th shard from the I-th, for N calls at the same time (SLURM arrays); the last one to end
    finishes the dataset."""
    labels: tyro.conf.OmitArgPrefixes[Labels] = Labels()
    work: tyro.conf.OmitArgPrefixes[Workers] = Workers()

    def options(self) -> PackOptions:
        """What the packed bytes depend on; DatasetError for values that make no sense."""
        if self.resize is not None and self.resize < 1:
            raise DatasetError(f"--resize {self.resize} is no length in pixels")
        if self.quality is not None and (self.resize is None or not 1 <= self.quality <= 100):
            raise DatasetError(f"--quality {self.quality}: 1 to 100, and with --resize, which is what encodes again")
        name = default_name(self.src) if self.name is None else self.name
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not re.fullmatch(r"[A-Za-z0-9_-]+", self.split):
            raise DatasetError(f"--name {name}, --split {self.split}: letters, digits, _ and -, for file names")
        shard_bytes = parse_bytes(self.shard_size)
        return PackOptions(name, self.split, shard_bytes, self.seed, self.resize, self.quality, self.labels.label_field)


def default_name(src: str) -> str:
    """What a dataset is called after its source: its last part that names more than a split (imagenet/train)."""
    path = src.partition("?")[0] if "://" in src else os.path.abspath(src)
    words = set().union(*SPLITS.values())
    for part in reversed(path.split("/")):
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", re.split(r"[.{*?\[]", part)[0])
        name = re.sub(rf"[-_]({'|'.join(words)})$", "", name.strip("-_"))
        if name and name.lower() not in words | {"data"}:
            return name
    return "images"


def parse_bytes(text: str) -> int:
    """Bytes of a size as people write it, such as 256MiB; DatasetError when it is none."""
    match = re.fullmatch(r"(\d+) ?([KMG]iB|B)?", text)
    if match is None or not int(match[1]):
        raise DatasetError(f"--shard-size {text} is no size; write 256MiB, 1GiB or a number of bytes")
    return int(match[1]) * _UNITS[match[2] or ""]


def parse_part(text: str) -> tuple[int, int]:
    """I and N of "I/N"; DatasetError when it is no part."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise DatasetError(f"--part {text} is no part; write I/N, from 1/N to N/N")
    return int(match[1]), int(match[2])


def run_shown(build: Callable[[Report], PackResult], dst: str) -> int:
    """Runs a build, shows its progress and what came of it; 0, or 130 after Ctrl-C."""
    folder = Storage.at(dst)  # as it is shown: without what credentials a URI may hold
    try:
        with interruptible(), PackProgress() as display:
            result = build(display)
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the shards that are not finished", file=sys.stderr)
        return 130
    if result.missing:
        print(f"{folder}: {result.built:,} shards built now; {result.missing:,} of {result.shards:,} are still missing")
        return 0
    print(
        f"{folder}: {result.samples:,} samples in {result.shards:,} shards ({result.built:,} built now), "
        f"{result.quarantined:,} files quarantined"
        + (f", listed in {folder}/quarantine.jsonl" if result.quarantined else "")
    )
    return 0


def main(args: list[str]) -> int:
    """`maelstream pack`; 0 when the dataset, or this part of it, is whole, 130 after Ctrl-C."""
    command = parse_arguments(Pack, args, "pack")
    options, names, part = command.options(), command.labels.names(), parse_part(command.part)
    executor, strict = command.work.make(), command.work.strict
    return run_shown(
        lambda report: pack(command.src, command.dst, options, executor, report, names, part, strict), command.dst
    )
