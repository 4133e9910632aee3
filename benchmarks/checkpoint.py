"""What a save costs the step: seconds that training stands still, beside the seconds that the save takes.

One rank, the state of a model of the paper in float32 (weights and two moments), beside torch.save of the same tensors
with fsync, during which training would stand still.

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
    """Time saves."""

    model: Literal["b16", "l16", "h14"] = "b16"
    rounds: int = 3
    folder: Path | None = None
    """Where to write; a temporary folder if not given."""


def partition_of_shapes(shapes: dict[str, tuple[int, ...]]) -> Partition:
    """One flat partition of all parameters, with moments."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    flat = torch.randn(sum(sizes))
    optimizer = torch.optim.AdamW([flat])
    optimizer.state[flat] = {"step": torch.tensor(1.0), **{kind: torch.randn(len(flat)) for kind in MOMENTS}}
    pieces, place = [], 0
    for name, size in zip(shapes, sizes, strict=True):
        pieces.append(Piece(name, 0, size, 0, place))
        place += size
    return Partition(pieces, [flat], optimizer)


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.checkpoint", description=__doc__)
    with torch.device("meta"):
        model = MAE(load_recipe(RECIPES / f"pretrain_vit_{options.model}.yaml").model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    partition = partition_of_shapes(shapes)
    gib = 12 * len(partition.flats[0]) / 2**30
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        saver = Saver(CheckpointStore(folder / "ours"), control_group(), shapes, 1, 0, lambda: None, lambda step: None)
        stands, takes, plain = [], [], []
        for step in range(1, options.rounds + 2):  # the first one allocates the memory for copies
            began = time.perf_counter()
            saver.save(partition, step, state(step))
            stands.append(time.perf_counter() - began)
            saver.finish()
            takes.append(time.perf_counter() - began)
            began = time.perf_counter()
            tensors = {"weight": partition.flats[0], **{kind: partition.moment(0, kind) for kind in MOMENTS}}
            torch.save(tensors, folder / "plain")
            sync(folder / "plain")
            plain.append(time.perf_counter() - began)
            os.unlink(folder / "plain")
        shutil.rmtree(folder / "ours")
    ours, ours_stands = statistics.median(takes[1:]), statistics.median(stands[1:])
    table = Table("save", "seconds", "training stands still", "share", title=f"{options.model}, {gib:.1f} GiB of state")
    table.add_row("ours, hashed, merged weights", f"{ours:.2f}", f"{ours_stands:.3f}", f"{ours_stands / ours:.1%}")
    first = stands[0] / takes[0]
    table.add_row("  the first of a start", f"{takes[0]:.2f}", f"{stands[0]:.3f}", f"{first:.1%}")
    took = statistics.median(plain[1:])
    table.add_row("torch.save and fsync", f"{took:.2f}", f"{took:.3f}", "100 %")
    Console().print(table)


if __name__ == "__main__":
    main()
