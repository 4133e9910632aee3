"""`maelstream pack SRC DST`: packs images into tar shards, with an index and side files."""

import re
from dataclasses import dataclass
from typing import Annotated

import tyro

from maelstream.jobs.arguments import parse_arguments
from maelstream.jobs.packing.build import run_build
from maelstream.jobs.packing.options import Labels, Workers, dataset_name
from maelstream.shards.errors import DatasetError
from maelstream.shards.pack import pack
from maelstream.shards.plan import PackOptions

_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Pack:
    """Pack images into tar shards. The same command resumes a build that was stopped.

    SRC is one of: a folder that holds one folder of images per class, or train/ and val/ with such folders; the
    ILSVRC2012 tars as downloaded, WebDataset shards, tars of class folders, or Hugging Face Parquet files and saved
    datasets (their folder, one file, or a pattern such as 'train-{0000..1023}.tar'); the lists of iNaturalist or Places
    with their images, or one of these lists. SRC and DST are local paths, or s3:// or gs:// URIs.
    """

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Images to pack."""
    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """The packed dataset: a new or empty folder, or one that an earlier call did not finish."""
    split: str = "train"
    """Split to pack if SRC has several; it is also part of the shards' file names."""
    name: str | None = None
    """Name of the dataset, the other part of the shards' file names; derived from SRC if not given."""
    shard_size: str = "256MiB"
    """Approximate bytes of SRC per shard."""
    seed: int = 0
    """Seed of the order of samples in the shards."""
    resize: int | None = None
    """Shrink images to this short side in pixels if theirs is longer (bicubic, antialiased), and encode them as JPEG.
    All other images keep their bytes."""
    quality: int | None = None
    """Quality of the JPEGs that --resize writes, 1 to 100; 90 if not given."""
    reencode: bool = False
    """Store images that PIL decodes and DALI does not (GIF, TIFF, BMP with 16 bits, ...) as PNG; of several pictures in
    a file, the first. Otherwise they are listed in quarantine.jsonl."""
    part: str = "1/1"
    """I/N builds every N-th shard from the I-th. Run N such calls at once (a SLURM array); the last to end completes
    the dataset."""
    labels: tyro.conf.OmitArgPrefixes[Labels] = Labels()
    work: tyro.conf.OmitArgPrefixes[Workers] = Workers()

    def options(self) -> PackOptions:
        """The options that the packed bytes depend on; DatasetError for invalid values."""
        if self.resize is not None and self.resize < 1:
            raise DatasetError(f"--resize {self.resize} is no length in pixels")
        if self.quality is not None and (self.resize is None or not 1 <= self.quality <= 100):
            raise DatasetError(f"--quality {self.quality}: 1 to 100, and with --resize, which is what encodes again")
        name = dataset_name(self.name, self.src, self.split)
        shard_bytes = parse_bytes(self.shard_size)
        return PackOptions(
            name,
            self.split,
            shard_bytes,
            self.seed,
            self.resize,
            self.quality,
            self.labels.label_field,
            self.reencode,
            self.labels.image_field,
            self.labels.labels,
        )


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "256MiB"; DatasetError if `text` is not a size."""
    match = re.fullmatch(r"(\d+) ?([KMG]iB|B)?", text)
    if match is None or not int(match[1]):
        raise DatasetError(f"--shard-size {text} is no size; write 256MiB, 1GiB or a number of bytes")
    return int(match[1]) * _UNITS[match[2] or ""]


def parse_part(text: str) -> tuple[int, int]:
    """I and N of "I/N"; DatasetError if `text` is not a part."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise DatasetError(f"--part {text} is no part; write I/N, from 1/N to N/N")
    return int(match[1]), int(match[2])


def main(args: list[str]) -> int:
    """`maelstream pack`; returns 0 when the dataset, or this part of it, is complete, and 130 after Ctrl-C."""
    command = parse_arguments(Pack, args, "pack")
    options, names, part = command.options(), command.labels.names(), parse_part(command.part)
    executor, strict = command.work.make(), command.work.strict
    return run_build(
        lambda report: pack(command.src, command.dst, options, executor, report, names, part, strict), command.dst
    )
