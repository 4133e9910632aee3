"""`maelstream launch --nproc N pretrain RECIPE --run DIR`: starts ranks, watches them, and starts them again.

On one machine, give `--nproc`. On several, run the same command on each with `--nnodes`, `--node-rank` and `--master`,
or run it once with `--hostfile`, which starts it on every host through ssh.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from maelstream.jobs.arguments import asks_for_help, parse_arguments
from maelstream.jobs.distributed.launching import (
    LaunchError,
    LocalRanks,
    RemoteLaunchers,
    rank_count,
    read_hostfile,
    run_hosts,
    run_local,
)

_LAUNCHED = ("pretrain", "profile", "finetune", "linprobe", "partial", "scratch", "evaluate", "knn")


@dataclass(frozen=True)
class Launch:
    """Start a command's ranks here or on many hosts, and start them again after a failure, on what is left."""

    command: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(
            metavar="COMMAND ...",
            help=f"What every rank runs, with its arguments: {', '.join(_LAUNCHED)}.",
            help_behavior_hint="",
        ),
    ]
    nproc: int | None = None
    """Ranks on this machine; one per GPU if not given."""
    max_restarts: int = 0
    """How often to start again after a failure. A rank that fails first twice in a row is left out from then on, and so
    is a host that no longer answers: checkpoints load on any number of ranks."""
    nnodes: int = 1
    """Machines that run this command."""
    node_rank: int = 0
    """Number of this machine, from 0."""
    master: str = ""
    """HOST:PORT of the machine with node rank 0, the same on every machine; a free port of this one if not given."""
    hostfile: Path | None = None
    """One line per host, `HOST slots=N`: starts all of them from here, through ssh without a password."""


def main(args: list[str]) -> int:
    """Runs `maelstream launch`; returns the exit code of the ranks."""
    cut = next((index for index, arg in enumerate(args) if arg in _LAUNCHED), len(args))
    if cut == len(args) and not asks_for_help(args):
        raise LaunchError("give the command after the options: `maelstream launch --nproc 8 pretrain RECIPE --run DIR`")
    launch = replace(parse_arguments(Launch, args[:cut], "launch", Launch(command=())), command=tuple(args[cut:]))
    if launch.max_restarts < 0 or launch.nnodes < 1 or not 0 <= launch.node_rank < launch.nnodes:
        raise LaunchError("--max-restarts and --node-rank start at 0, --nnodes at 1, and --node-rank is below --nnodes")
    if launch.hostfile is not None:
        hosts = tuple(read_hostfile(launch.hostfile))
        return run_hosts(RemoteLaunchers(launch.command, hosts), launch.max_restarts)
    if launch.nnodes > 1 and ":" not in launch.master:
        raise LaunchError("--nnodes needs --master HOST:PORT, the same on every machine")
    devices = tuple(range(rank_count(launch.nproc)))
    ranks = LocalRanks(launch.command, devices, launch.nnodes, launch.node_rank, launch.master)
    return run_local(ranks, launch.max_restarts)
