"""`maelstream plan --model vit-h14 --gpus 256 --gpu h100 --dataset-size 1.28M`: predicts the cost of a run.

It uses formulas only: memory per rank under ZeRO 1 to 3, the largest micro-batch, the parts of a step and the
bottleneck, images/s, bytes/s from storage, hours. Sources and checks of the formulas: docs/profiling.md.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

from maelstream.jobs.arguments import parse_arguments
from maelstream.jobs.hardware import DEVICES, Device, measure_this_machine
from maelstream.jobs.recipe import RecipeError, load_recipe, named_recipes
from maelstream.model.config import MAEConfig
from maelstream.model.flops import recomputed_flops, training_flops
from maelstream.model.memory import (
    StateBytes,
    activation_bytes,
    moved_bytes,
    parameter_count,
    state_bytes,
    traffic,
    update_bytes,
)
from maelstream.model.sizes import PAPER_SIZES

MODELS = {name.replace("_", "-"): MAEConfig(**size._asdict()) for name, size in PAPER_SIZES.items()}
RESERVED_BYTES = 4e9
"""GPU memory that the model cannot use: CUDA's context, DALI's buffers, fragmentation of the allocator."""


@dataclass(frozen=True)
class Plan:
    """Predict memory, speed, hours and the bottleneck of a pre-training run, on any listed hardware."""

    model: str = "vit-b16"
    """vit-b16, vit-l16, vit-h14, or the name or the file of a recipe with the model."""
    gpus: int = 8
    """Number of GPUs; with `here`, of machines like this one."""
    gpu: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join((*DEVICES, 'here'))}}}")] = "h100"
    """`here` measures matrix products and memory of this machine for a few seconds."""
    dataset_size: str = "1.28M"
    """Number of images: 1.28M, 400M, 5B."""
    zero: Literal[1, 2, 3] = 1
    """ZeRO stage: optimizer state (1), gradients too (2), weights too (3) are partitioned."""
    epochs: float = 800.0
    """Passes over the dataset."""
    batch_size: int = 4096
    """Images per step, over all GPUs."""
    micro_batch_size: int | None = None
    """Images that a GPU processes at once; by default as many as fit."""
    activation_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass."""
    image_bytes: int = 110_000
    """Mean size of an encoded image; the default is ImageNet's."""
    decode_images_per_s: float | None = None
    """Images/s that one GPU, or its share of the CPUs, decodes; `maelstream loader` measures it."""
    storage_gb_per_s: float | None = None
    """Rate of the storage for all GPUs together; not limited by default."""
    json: bool = False
    """Print the figures as JSON."""


class PlannedRun(NamedTuple):
    """The run whose cost is predicted."""

    model: MAEConfig
    ranks: int
    stage: int
    batch_size: int
    checkpointing: bool
    samples: float
    """Images seen in total: epochs x dataset size."""
    image_bytes: int
    storage_bytes_per_s: float | None


class Memory(NamedTuple):
    """Memory of one rank, in bytes."""

    state: StateBytes
    image: int
    """Activations of one image."""
    largest: int
    """Largest micro-batch that fits in addition to the state; it may exceed the rank's share of a batch. 0: none."""


class Step(NamedTuple):
    """Seconds of one optimizer step, by part; None if the hardware's rate is not known."""

    products: float
    """Matrix products."""
    moves: float
    """Operators between the matrix products, which are memory-bound."""
    optimizer: float
    communication: float | None
    decode: float | None
    """Overlaps with the step."""
    storage: float | None
    """Overlaps with the step."""

    @property
    def parts(self) -> dict[str, float]:
        """Seconds that each possible bottleneck takes alone; parts that are not known are left out."""
        compute = self.products + self.moves + self.optimizer
        parts = {
            "compute": compute,
            "communication": self.communication,
            "decode": self.decode,
            "storage": self.storage,
        }
        return {name: seconds for name, seconds in parts.items() if seconds is not None}

    @property
    def seconds(self) -> float:
        """Duration of the step. Compute and communication alternate (`overlap_comm` is off); data overlap with both."""
        parts = self.parts
        return max(parts["compute"] + parts.get("communication", 0), parts.get("decode", 0), parts.get("storage", 0))

    @property
    def bound(self) -> str:
        """The bottleneck: the part whose speed-up would help most."""
        parts = self.parts
        slowest = max((parts.get(name, 0.0), name) for name in ("decode", "storage"))
        if slowest[0] >= self.seconds:
            return slowest[1]
        return "compute" if parts["compute"] >= parts.get("communication", 0) else "communication"


def predict_memory(run: PlannedRun, device: Device, stage: int, checkpointing: bool) -> Memory:
    """Memory of a rank, and the number of images that fit in addition to its state."""
    state = state_bytes(run.model, stage, run.ranks)
    image = activation_bytes(run.model, checkpointing, device.element)
    free = device.memory_bytes - RESERVED_BYTES - sum(state)
    return Memory(state, image, max(0, int(free // image)))


def micro_batches_per_step(run: PlannedRun, largest: int) -> int:
    """Micro-batches per rank and step, as `jobs/training/data.py` splits the batch."""
    return math.ceil(math.ceil(run.batch_size / run.ranks) / largest)


def predict_step(run: PlannedRun, device: Device, micro_batches: int) -> Step:
    """The step of one rank, which processes batch_size / ranks images in `micro_batches`."""
    images = run.batch_size / run.ranks
    flops = training_flops(run.model) + (recomputed_flops(run.model) if run.checkpointing else 0)
    memory_bytes_per_s = device.memory_bytes_per_s * device.bandwidth_share
    ring = device.ring_bytes_per_s(run.ranks)
    sent = traffic(run.model, run.stage, run.ranks, micro_batches).sent(run.ranks)
    return Step(
        products=images * flops / (device.flops_per_s * device.matrix_share),
        moves=images * moved_bytes(run.model, run.checkpointing, device.element) / memory_bytes_per_s,
        optimizer=update_bytes(parameter_count(run.model), run.stage, run.ranks) / memory_bytes_per_s,
        communication=0.0 if run.ranks == 1 else None if ring is None else sent / ring,
        decode=None if device.decode_images_per_s is None else images / device.decode_images_per_s,
        storage=None if run.storage_bytes_per_s is None else run.batch_size * run.image_bytes / run.storage_bytes_per_s,
    )


def predict(run: PlannedRun, device: Device, micro_batch: int) -> dict[str, Any]:
    """All figures that the command prints, by name, with units in the names."""
    micro_batches = micro_batches_per_step(run, micro_batch)
    step = predict_step(run, device, micro_batches)
    images_per_s = run.batch_size / step.seconds
    return {
        "micro_batch": micro_batch,
        "micro_batches": micro_batches,
        "step_s": step._asdict(),
        "images_per_s": images_per_s,
        "storage_bytes_per_s": images_per_s * run.image_bytes,
        "mfu": images_per_s / run.ranks * training_flops(run.model) / device.flops_per_s,
        "communication_over_compute": None
        if step.communication is None
        else step.communication / step.parts["compute"],
        "hours": run.samples / images_per_s / 3600,
        "bound": step.bound,
    }


def parse_count(text: str) -> float:
    """A number written as 1.28M, 400M, 5B, 50k or plain digits.

    Raises:
        RecipeError: any other text, or a number below 1.
    """
    factor = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower(), 1.0)
    try:
        count = float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        count = 0.0
    if not 1 <= count < math.inf:
        raise RecipeError(f"--dataset-size {text} is not a number of images; write it as 1.28M, 400M or 5B")
    return count


def planned_model(name: str) -> MAEConfig:
    """A model of the paper, or the model of a recipe, by name or file."""
    if name in MODELS:
        return MODELS[name]
    if not name.endswith((".yaml", ".yml")) and name not in named_recipes():
        raise RecipeError(f"--model {name} is neither one of {', '.join(MODELS)} nor a recipe (*.yaml, or its name)")
    return load_recipe(Path(name)).model


def planned_device(command: Plan) -> Device:
    """The accelerator of the plan; `--gpu here` measures this machine."""
    if command.gpu != "here" and command.gpu not in DEVICES:
        raise RecipeError(f"--gpu {command.gpu} is not one of {', '.join(DEVICES)}, here")
    device = measure_this_machine() if command.gpu == "here" else DEVICES[command.gpu]
    if command.decode_images_per_s is None:
        return device
    return Device(**asdict(device) | {"decode_images_per_s": command.decode_images_per_s})


def gigabytes(count: float) -> str:
    """The number of GB, without the unit."""
    return f"{count / 1e9:,.2f}"


def memory_table(run: PlannedRun, device: Device) -> Table:
    """Memory of one rank at each ZeRO stage, and the largest micro-batch."""
    stages = (1, 2, 3)
    plain, saving = ([predict_memory(run, device, stage, each) for stage in stages] for each in (False, True))
    title = f"GB on each of {run.ranks:,} x {device.name}, which has {device.memory_bytes / 1e9:,.0f} GB"
    table = Table("", *(f"ZeRO {stage}{' *' if stage == run.stage else ''}" for stage in stages), title=title)
    for name in StateBytes._fields:
        table.add_row(name, *(gigabytes(getattr(each.state, name)) for each in plain))
    table.add_row("total", *(gigabytes(sum(each.state)) for each in plain), style="bold")
    for name, memories in {"largest micro-batch": plain, "with activation checkpointing": saving}.items():
        table.add_row(name, *(f"{each.largest:,}" if each.largest else "does not fit" for each in memories))
    return table


def step_table(step: dict[str, float | None], seconds: float) -> Table:
    """One row per part of a step."""
    table = Table("part of a step", "ms", "share of the step")
    for name, part in step.items():
        known = ("not known", "") if part is None else (f"{1e3 * part:,.2f}", f"{part / seconds:.0%}")
        table.add_row(name, *known)
    return table


def show(run: PlannedRun, device: Device, memory: Memory, figures: dict[str, Any]) -> None:
    """Prints the tables and a summary."""
    console = Console(markup=False, emoji=False)
    console.print(memory_table(run, device))
    console.print(
        f"activations per image: {memory.image / 1e6:,.1f} MB"
        f"{' with activation checkpointing' if run.checkpointing else ''}; "
        f"micro-batch {figures['micro_batch']:,}, {figures['micro_batches']:,} per step and GPU"
    )
    console.print(step_table(figures["step_s"], run.batch_size / figures["images_per_s"]))
    ratio = figures["communication_over_compute"]
    console.print(
        f"{figures['images_per_s']:,.0f} images/s ({figures['images_per_s'] / run.ranks:,.0f} per GPU), "
        f"{figures['storage_bytes_per_s'] / 1e9:,.2f} GB/s from storage, MFU {figures['mfu']:.0%}, "
        f"communication / compute {'not known' if ratio is None else f'{ratio:.2f}'}"
    )
    console.print(f"{run.samples:,.0f} images take {figures['hours']:,.1f} hours; bottleneck: {figures['bound']}")
    console.print("assumed:", "; ".join(assumptions(run, device)))


def assumptions(run: PlannedRun, device: Device) -> list[str]:
    """The rates that the prediction assumes, each with the option that replaces it, if there is one."""

    def gb(rate: float | None) -> str:
        return "not known" if rate is None else f"{rate / 1e9:,.0f} GB/s"

    decode, storage = device.decode_images_per_s, run.storage_bytes_per_s
    return [
        f"matrix products at {device.matrix_share:.0%} of {device.flops_per_s / 1e12:,.1f} TFLOP/s",
        f"memory at {device.bandwidth_share:.0%} of {gb(device.memory_bytes_per_s)}, "
        f"{gigabytes(RESERVED_BYTES)} GB of it reserved",
        f"links at {device.bandwidth_share:.0%} of {gb(device.link_bytes_per_s)} inside a machine and "
        f"{gb(device.network_bytes_per_s)} between machines",
        f"decoding {'not limited' if decode is None else f'{decode:,.0f} images/s per GPU'} (--decode-images-per-s)",
        f"storage {'not limited' if storage is None else gb(storage)} (--storage-gb-per-s)",
        f"{run.image_bytes:,} bytes per image (--image-bytes)",
    ]


def main(args: list[str]) -> int:
    """Entry point of `maelstream plan`."""
    command = parse_arguments(Plan, args, "plan")
    positive = {
        "--gpus": command.gpus,
        "--epochs": command.epochs,
        "--image-bytes": command.image_bytes,
        "--micro-batch-size": command.micro_batch_size,
        "--decode-images-per-s": command.decode_images_per_s,
        "--storage-gb-per-s": command.storage_gb_per_s,
    }
    for name, value in positive.items():
        if value is not None and value <= 0:
            raise RecipeError(f"{name} {value} must be positive")
    if command.batch_size < command.gpus:
        raise RecipeError(
            f"a batch of {command.batch_size} images cannot be split over {command.gpus} GPUs; use fewer GPUs or a "
            "larger --batch-size"
        )
    samples = command.epochs * parse_count(command.dataset_size)
    storage = None if command.storage_gb_per_s is None else 1e9 * command.storage_gb_per_s
    model, device = planned_model(command.model), planned_device(command)
    run = PlannedRun(
        model,
        command.gpus,
        command.zero,
        command.batch_size,
        command.activation_checkpointing,
        samples,
        command.image_bytes,
        storage,
    )
    memory = predict_memory(run, device, run.stage, run.checkpointing)
    if memory.largest < (command.micro_batch_size or 1):
        fits = f"micro-batches up to {memory.largest}" if memory.largest else "no image"
        raise RecipeError(
            f"one {device.name} fits {fits} in addition to {gigabytes(sum(memory.state))} GB of state at ZeRO "
            f"{run.stage}, with {memory.image / 1e6:,.1f} MB of activations per image; use a smaller "
            "micro-batch, more GPUs, a higher --zero or --activation-checkpointing"
        )
    share = math.ceil(run.batch_size / run.ranks)
    figures = predict(run, device, min(command.micro_batch_size or memory.largest, share))
    if command.json:
        stages = {stage: predict_memory(run, device, stage, run.checkpointing) for stage in (1, 2, 3)}
        state = {f"zero_{stage}": each.state._asdict() | {"largest": each.largest} for stage, each in stages.items()}
        print(json.dumps({"device": asdict(device), "activation_bytes": memory.image, "state_bytes": state} | figures))
        return 0
    show(run, device, memory, figures)
    return 0
