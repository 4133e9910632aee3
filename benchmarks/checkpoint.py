"""Measures what a save costs training: the seconds that training is blocked, and the seconds until the save is done.

One rank saves the float32 state of a model of the paper (weights and two moments). For comparison, torch.save writes
the same tensors with fsync, which would block training all the time.

    python -m benchmarks.checkpoint --model b16 --rounds 3
"""

import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from maelstream.jobs.checkpointing.partition import MOMENTS, Partition, Piece
from maelstream.jobs.checkpointing.saver import Saver
from maelstream.jobs.checkpointing.store import CheckpointStore
from maelstream.jobs.recipe import load_recipe
from maelstream.model.mae import MAE
from maelstream.shards.durable import sync
from tests.helpers.saved import control_group, state

RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True)
class Options:
    """Measure saves of checkpoints."""

    model: Literal["b16", "l16", "h14"] = "b16"
    rounds: int = 3
    folder: Path | None = None
    """Folder to write to; the system's temporary folder if not given."""


def partition_of_shapes(shapes: dict[str, tuple[int, ...]]) -> Partition:
    """One flat partition of all parameters, with moments."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    flat = torch.randn(sum(sizes))
    optimizer = torch.optim.AdamW([flat])
    optimizer.state[flat] = {"step": torch.tensor(1.0), **{kind: torch.randn(len(flat)) for kind in MOMENTS}}
    pieces, offset = [], 0
    for name, size in zip(shapes, sizes, strict=True):
        pieces.append(Piece(name, 0, size, 0, offset))
        offset += size
    return Partition(pieces, [flat], optimizer)


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.checkpoint", description=__doc__)
    with torch.device("meta"):
        model = MAE(load_recipe(RECIPES / "pretrain" / f"vit_{options.model}.yaml").model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    partition = partition_of_shapes(shapes)
    gib = 12 * len(partition.flats[0]) / 2**30
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        saver = Saver(CheckpointStore(folder / "ours"), control_group(), shapes, 1, 0, lambda: None, lambda step: None)
        blocked_s, saved_s, plain_s = [], [], []
        for step in range(1, options.rounds + 2):  # the first save allocates the memory for copies
            began = time.perf_counter()
            saver.save(partition, step, state(step))
            blocked_s.append(time.perf_counter() - began)
            saver.finish()
            saved_s.append(time.perf_counter() - began)
            began = time.perf_counter()
            tensors = {"weight": partition.flats[0], **{kind: partition.moment(0, kind) for kind in MOMENTS}}
            torch.save(tensors, folder / "plain")
            sync(folder / "plain")
            plain_s.append(time.perf_counter() - began)
            os.unlink(folder / "plain")
        shutil.rmtree(folder / "ours")
    ours, ours_blocked = statistics.median(saved_s[1:]), statistics.median(blocked_s[1:])
    table = Table("save", "seconds", "training blocked", "share", title=f"{options.model}, {gib:.1f} GiB of state")
    table.add_row("ours, hashed, merged weights", f"{ours:.2f}", f"{ours_blocked:.3f}", f"{ours_blocked / ours:.1%}")
    first = blocked_s[0] / saved_s[0]
    table.add_row("  the first of a process", f"{saved_s[0]:.2f}", f"{blocked_s[0]:.3f}", f"{first:.1%}")
    plain = statistics.median(plain_s[1:])
    table.add_row("torch.save and fsync", f"{plain:.2f}", f"{plain:.3f}", "100 %")
    Console().print(table)


if __name__ == "__main__":
    main()
