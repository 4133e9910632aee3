"""`maelstream pack SRC DST`: images -> tar shards, an index and their side files."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from shards.errors import DatasetError
from shards.pack import pack
from shards.plan import PackOptions

_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Pack:
    """Pack a folder of images (one folder a class) into tar shards. Started again, it goes on where it stopped."""

    src: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """A folder that holds one folder of images a class."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """The packed dataset: a new or empty folder, or one that an earlier call did not finish."""
    split: str = "train"
    """Part of the shards' file names."""
    name: str | None = None
    """The other part; SRC's own name if not given."""
    shard_size: str = "256MiB"
    """About how large a shard gets."""
    workers: int = len(os.sched_getaffinity(0))
    """Processes; each builds a shard at a time."""
    seed: int = 0
    """The order of samples in the shards depends on it."""


def parse_bytes(text: str) -> int:
    """Bytes of a size as people write it, such as 256MiB; DatasetError when it is none."""
    match = re.fullmatch(r"(\d+) ?([KMG]iB|B)?", text)
    if match is None or not int(match[1]):
        raise DatasetError(f"--shard-size {text} is no size; write 256MiB, 1GiB or a number of bytes")
    return int(match[1]) * _UNITS[match[2] or ""]


def main(args: list[str]) -> int:
    """`maelstream pack`; 0 when the dataset is whole, 130 after Ctrl-C."""
    command = tyro.cli(Pack, args=args, prog="maelstream pack")
    name = command.name or re.sub(r"[^A-Za-z0-9_-]", "-", command.src.resolve().name)
    options = PackOptions(name, command.split, parse_bytes(command.shard_size), command.seed)
    columns = TextColumn("{task.description}"), TimeElapsedColumn()
    samples = quarantined = total_bytes = 0
    with Progress(*columns, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("packing")

        def on_shard(shard_samples: int, shard_quarantined: int, shard_bytes: int) -> None:
            nonlocal samples, quarantined, total_bytes
            samples, quarantined = samples + shard_samples, quarantined + shard_quarantined
            total_bytes += shard_bytes
            text = f"{samples:,} samples, {total_bytes / 2**20:,.1f} MiB, {quarantined:,} quarantined"
            bar.update(task, description=text)
            if bar.disable:
                print(text, flush=True)

        try:
            result = pack(command.src, command.dst, options, command.workers, on_shard)
        except KeyboardInterrupt:
            print("\nstopped; the same command goes on with the shards that are not finished", file=sys.stderr)
            return 130
    print(
        f"{command.dst}: {result.samples:,} samples in {result.shards:,} shards ({result.built:,} built now), "
        f"{result.quarantined:,} files quarantined"
        + (f", listed in {command.dst / 'quarantine.jsonl'}" if result.quarantined else "")
    )
    return 0
