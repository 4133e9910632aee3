"""`maelstream table2`: the paper's table 2 here: time saved by dropping mask tokens and by a small decoder."""

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from maelstream.jobs.arguments import check_output_file, parse_arguments
from maelstream.jobs.hardware import process_device
from maelstream.jobs.recipe import RecipeError


@dataclass(frozen=True)
class Table2:
    """Time the models of the paper's table 2 on this machine, and project the hours of its 800 epochs."""

    size: tuple[Literal["large", "huge"], ...] = ("large", "huge")
    """Encoders to time."""
    devices: int = 1
    """Number of machines like this one, or GPUs like this one, that share the work; assumes perfect scaling."""
    batch: int = 0
    """Images per forward pass; if not given, 64 on a GPU and 2 on a CPU."""
    rounds: int = 3
    """Steps per model, after one warm-up step."""
    json: Path | None = None
    """Write all figures to this JSON file."""


def main(args: list[str]) -> int:
    """`maelstream table2`."""
    command = parse_arguments(Table2, args, "table2")
    if command.devices < 1 or command.rounds < 1 or command.batch < 0 or not command.size:
        raise RecipeError("--devices, --rounds and --batch are at least 1, and --size names at least one encoder")
    if command.json is not None:
        check_output_file("--json", command.json)
    import torch  # takes seconds; the options are checked before

    from maelstream.jobs.profiling.table2_times import EPOCHS, IMAGES, measure

    device = process_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    measured = measure(command.size, command.batch, command.devices, command.rounds, device)
    title = f"{command.devices} x {name}, {EPOCHS} epochs of {IMAGES:,} images"
    columns = "encoder", "model", "images/s", "hours", "faster by", "paper", "paper's hours, 128 TPU-v3 cores"
    table = Table(*columns, title=title)
    for row in measured:
        numbers = f"{row['images_per_s']:,.3g}", f"{row['hours']:,.0f}", f"{row['faster_by']:.2f}"
        table.add_row(row["size"], row["model"], *numbers, f"{row['paper_faster_by']:.1f}", f"{row['paper_hours']}")
    Console(markup=False, emoji=False).print(table)
    if command.json is not None:
        command.json.write_text(
            json.dumps({"machine": name, "devices": command.devices, "rows": measured}, indent=1) + "\n"
        )
    return 0
