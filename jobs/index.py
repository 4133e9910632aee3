"""`maelstream index DST`: adopts existing tar shards; it writes an index and side files into their folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from maelstream.jobs.arguments import parse_arguments
from maelstream.jobs.packing.options import Labels, Workers, dataset_name
from maelstream.shards.errors import DatasetError


@dataclass(frozen=True)
class Index:
    """Make a dataset of existing WebDataset shards, which stay unchanged.

    Every image is decoded once; those that fail are listed in quarantine.jsonl and left out of the index.
    """

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """A folder of .tar shards of one split; a local path or a URI."""
    split: str = "train"
    """Name of the split."""
    name: str | None = None
    """Name of the dataset; derived from DST if not given."""
    labels: tyro.conf.OmitArgPrefixes[Labels] = Labels()
    work: tyro.conf.OmitArgPrefixes[Workers] = Workers()


def main(args: list[str]) -> int:
    """`maelstream index`; returns 0 when the dataset is complete and 130 after Ctrl-C."""
    command = parse_arguments(Index, args, "index")
    if "://" not in command.dst and not Path(command.dst).is_dir():
        raise DatasetError(f"{command.dst}: no such folder; DST holds the .tar shards of one split")
    from maelstream.jobs.packing.build import run_build  # these take longer to import than the help to print
    from maelstream.shards.pack import index
    from maelstream.shards.plan import PackOptions

    name = dataset_name(command.name, command.dst, command.split)
    # Adopting uses neither size nor seed, but the build's fingerprint holds them: these are the defaults of `pack`.
    options = PackOptions(
        name,
        command.split,
        shard_bytes=2**28,
        seed=0,
        label_field=command.labels.label_field,
        image_field=command.labels.image_field,
        labels=command.labels.labels,
    )
    names, executor, strict = command.labels.names(), command.work.make(), command.work.strict
    return run_build(lambda report: index(command.dst, options, executor, report, names, strict), command.dst)
