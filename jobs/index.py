"""`maelstream index DST`: adopts tar shards where they lie; an index and side files are written beside them."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from maelstream.jobs.arguments import parse_arguments
from maelstream.jobs.pack import Labels, Pack, Workers, run_shown
from maelstream.shards.pack import index


@dataclass(frozen=True)
class Index:
    """Make a dataset of WebDataset shards that stand already. Not a byte of them is changed.

    Every image is decoded once; what fails is listed in quarantine.jsonl and left out of the index.
    """

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """A folder of .tar shards, of one split; local or a URI."""
    split: str = "train"
    """What to call the split."""
    name: str | None = None
    """What to call the dataset; DST's own name if not given."""
    labels: tyro.conf.OmitArgPrefixes[Labels] = Labels()
    work: tyro.conf.OmitArgPrefixes[Workers] = Workers()


def main(args: list[str]) -> int:
    """`maelstream index`; 0 when the dataset is whole, 130 after Ctrl-C."""
    command = parse_arguments(Index, args, "index")
    options = Pack(command.dst, command.dst, command.split, command.name, labels=command.labels).options()
    names, executor, strict = command.labels.names(), command.work.make(), command.work.strict
    return run_shown(lambda report: index(command.dst, options, executor, report, names, strict), command.dst)
