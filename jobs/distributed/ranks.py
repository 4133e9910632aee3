"""Ranks: how a process joins the process group, and how ranks agree on flags and numbers."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

# Before DeepSpeed is imported, which otherwise warns on every rank that it found no accelerator.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator

from maelstream.jobs.distributed.errors import AgreedError, LostError, MeetingError, RanksError
from maelstream.shards.errors import MaelstreamError

# Their warnings name settings that we choose on purpose, or CUDA toolkits that a run on a CPU does not need.
for _logger in ("DeepSpeed", "torch.utils.cpp_extension"):
    logging.getLogger(_logger).setLevel(logging.ERROR)

_SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_STEP_TASKS_PER_NODE",
}


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, and how many ranks there are."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def threads(self) -> int:
        """This rank's share of the machine's cores."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world_size)


def ranks_from_environment() -> Ranks:
    """The ranks that the launcher set (`maelstream launch`, `deepspeed`, `torchrun` or `srun`); one without a launcher.

    Raises:
        RanksError: a launcher's variable is missing or wrong, or more ranks on this machine than it has GPUs.
    """
    # An sbatch script without srun has the tasks of the whole job in its variables, but is one process.
    started_by_srun = {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"} <= os.environ.keys()
    if "RANK" not in os.environ and started_by_srun and _number("SLURM_NTASKS", 1) > 1:
        # The tasks per node are like "4(x2)": 4 tasks on each of 2 nodes.
        os.environ |= {name: os.environ[slurm].partition("(")[0] for name, slurm in _SLURM.items()}
        if "MASTER_ADDR" not in os.environ:
            raise RanksError("srun sets no MASTER_ADDR; start from jobs/slurm/pretrain.sbatch, which exports it")
        os.environ.setdefault("MASTER_PORT", str(20000 + _number("SLURM_JOB_ID", 0) % 20000))
    world_size = _number("WORLD_SIZE", 1)
    local = _number("LOCAL_WORLD_SIZE", 0) or _number("LOCAL_SIZE", 0) or world_size  # torchrun, deepspeed
    ranks = Ranks(_number("RANK", 0), world_size, _number("LOCAL_RANK", 0), local)
    if not (ranks.rank < world_size and ranks.local_rank < local <= world_size):
        raise RanksError(
            f"RANK={ranks.rank} WORLD_SIZE={world_size} LOCAL_RANK={ranks.local_rank} LOCAL_WORLD_SIZE={local} do not "
            "fit together; unset them to run as one rank, or use a launcher, which sets them"
        )
    if torch.cuda.is_available() and ranks.local_world_size > torch.cuda.device_count():
        raise RanksError(
            f"{ranks.local_world_size} ranks on a machine with {torch.cuda.device_count()} GPUs; start one per GPU"
        )
    return ranks


def _number(name: str, default: int) -> int:
    """The value of an environment variable; RanksError if it is not a number from 0."""
    text = os.environ.get(name, "") or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise RanksError(f"{name}={text[:40]} is not a number from 0; unset it, or use a launcher, which sets it")
    return int(text)


@contextlib.contextmanager
def process_group(ranks: Ranks, timeout_s: float) -> Iterator["ControlGroup"]:
    """Joins the process group and leaves it when the block ends; a collective times out after `timeout_s` seconds.

    Raises:
        MeetingError: the ranks do not find one another.
        LostError: another rank ends inside the block.
    """
    environment = dict(os.environ)
    if ranks.world_size == 1:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ.setdefault("MASTER_PORT", str(free.getsockname()[1]))
    # The shared-memory all-reduce for CPUs is compiled at its first use, which takes a minute and a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(ranks.threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank)
    timeout = timedelta(seconds=timeout_s)
    try:
        deepspeed.init_distributed(get_accelerator().communication_backend_name(), verbose=False, timeout=timeout)
    except torch.distributed.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise MeetingError(f"rank {ranks.rank} cannot meet the others at {where} ({_first_line(error)})") from None
    try:
        yield ControlGroup(ranks, torch.distributed.new_group(backend="gloo", timeout=timeout))
    except MaelstreamError as error:
        error.found_by_all = isinstance(error, AgreedError)  # a bad sample, for example, is found by one rank alone
        raise
    except RuntimeError as error:  # gloo has no class of its own
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower():
            raise LostError(f"rank {ranks.rank} lost another rank ({_first_line(error)}); see its output") from None
        raise
    finally:
        torch.distributed.destroy_process_group()
        for name in {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - environment.keys():
            os.environ.pop(name, None)  # otherwise a process started later believes it is a rank


@dataclass(frozen=True)
class ControlGroup:
    """Agreement of ranks on a few numbers and texts, by gloo collectives on CPUs, which do not touch the GPUs' queues.

    Every method is a collective: all ranks must call it.
    """

    ranks: Ranks
    group: Any

    def sums(self, values: list[float]) -> list[float]:
        """The sum of each of `values` over all ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(total, group=self.group)
        return total.tolist()

    def any(self, value: bool) -> bool:
        """Whether `value` is true on at least one rank."""
        return self.sums([float(value)])[0] > 0

    def all_texts(self, text: str) -> list[str]:
        """The texts of all ranks, by rank."""
        texts: list[str] = [""] * self.ranks.world_size
        torch.distributed.all_gather_object(texts, text, group=self.group)
        return texts

    def text_of_first(self, text: str) -> str:
        """The text of rank 0; the argument of other ranks is ignored."""
        texts = [text]
        torch.distributed.broadcast_object_list(texts, src=0, group=self.group)
        return texts[0]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
