"""Writes checkpoints without an engine: two parameters, AdamW, and one rank."""

from pathlib import Path

import torch
import torch.distributed

from maelstream.jobs.checkpointing.partition import Partition, Piece
from maelstream.jobs.checkpointing.saver import Saver
from maelstream.jobs.checkpointing.store import CheckpointStore, State
from maelstream.jobs.distributed.ranks import ControlGroup, Ranks
from tests.helpers import faults
from tests.helpers.forked import CONTEXT

SHAPES = {"bias": (3,), "weight": (4, 5)}


def control_group() -> ControlGroup:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return ControlGroup(Ranks(0, 1, 0, 1), None)


def partition(seed: int) -> Partition:
    """Two flat partitions with padding, as in ZeRO, after one step of AdamW."""
    generator = torch.Generator().manual_seed(seed)
    flats = [torch.randn(size, generator=generator).requires_grad_() for size in (4, 22)]
    for flat in flats:
        flat.grad = torch.randn(flat.shape, generator=generator)
    optimizer = torch.optim.AdamW(flats)
    optimizer.step()
    return Partition([Piece("bias", 0, 3, 0, 1), Piece("weight", 0, 20, 1, 0)], flats, optimizer)


def state(step: int) -> State:
    return State(loader={"epoch": 0, "position": step}, dataset="d", optimizer_steps=step, world_size=1)


def saver(folder: Path, keep: int = 3, keep_every_steps: int = 0) -> Saver:
    return Saver(
        CheckpointStore(folder), control_group(), SHAPES, keep, keep_every_steps, lambda: None, lambda step: None
    )


def save(folder: Path, step: int, **keeping: int) -> None:
    """Writes a checkpoint of `partition(step)`."""
    writing = saver(folder, **keeping)
    writing.save(partition(step), step, state(step))
    writing.finish()


def _save_with_fault(folder: Path, step: int, fault: str) -> None:
    name, _, value = fault.partition(":")
    faults.FAULTS[name](value)
    save(folder, step, keep=1)


def save_in_a_process(folder: Path, step: int, fault: str) -> int:
    """Saves in a new process with an injected fault, keeping one checkpoint; returns its exit code."""
    process = CONTEXT.Process(target=_save_with_fault, args=(folder, step, fault))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode
