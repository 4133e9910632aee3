"""`maelstream plan --model vit-h14 --gpus 256 --gpu h100 --dataset-size 1.28M`: what a run will take, before it starts.

Formulas alone: memory of a rank under ZeRO 1 to 3, the largest micro-batch, the parts of a step and what bounds it,
images/s, bytes/s from storage, hours. Sources and checks: docs/profiling.md.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

from maelstream.jobs.arguments import parsed
from maelstream.jobs.hardware import DEVICES, Device, measure_this_machine
from maelstream.jobs.recipe import RecipeError, load_recipe
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
"""Of a GPU's memory: CUDA's context, DALI's buffers, what the allocator cannot use."""


@dataclass(frozen=True)
class Plan:
    """Tell memory, speed, hours and the bound of a pre-training run on hardware that need not be at hand."""

    model: str = "vit-b16"
    """vit-b16, vit-l16, vit-h14, or a recipe whose model it is."""
    gpus: int = 8
    gpu: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join((*DEVICES, 'here'))}}}")] = "h100"
    """`here` measures this machine's products and memory, for some seconds."""
    dataset_size: str = "1.28M"
    """Images: 1.28M, 400M, 5B."""
    zero: Literal[1, 2, 3] = 1
    epochs: float = 800.0
    batch_size: int = 4096
    """Images a step, over all GPUs."""
    micro_batch_size: int | None = None
    """Images that a GPU takes at once; the largest that fits, if not given."""
    activation_checkpointing: bool = False
    image_bytes: int = 110_000
    """Mean size of an encoded image; ImageNet's."""
    decode_images_per_s: float | None = None
    """What one GPU, or its share of the CPUs, decodes; from `maelstream loader`."""
    storage_gb_per_s: float | None = None
    """What storage gives to all GPUs together; no bound if not given."""
    json: bool = False
    """Print the figures as JSON."""


class Job(NamedTuple):
    """What is planned."""

    model: MAEConfig
    ranks: int
    stage: int
    batch_size: int
    checkpointing: bool
    samples: float
    """Images seen in all: epochs x dataset."""
    image_bytes: int
    storage_bytes_per_s: float | None


class Memory(NamedTuple):
    """Of one rank, in bytes."""

    state: StateBytes
    image: int
    """Activations of one image."""
    largest: int
    """Micro-batch that fits beside the state, which may be more than the rank's share of a batch; 0: none does."""


class Step(NamedTuple):
    """Seconds of one optimizer step, by part; None where the hardware's rate is not known."""

    products: float
    """Matrix products."""
    moves: float
    """Operators between them, bound by memory."""
    optimizer: float
    communication: float | None
    decode: float | None
    """Beside the step, as is `storage`."""
    storage: float | None

    @property
    def parts(self) -> dict[str, float]:
        """What bounds the run, with the seconds that each takes alone."""
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
        """Computing and communicating take turns (`overlap_comm` is off); data come beside them."""
        parts = self.parts
        return max(parts["compute"] + parts.get("communication", 0), parts.get("decode", 0), parts.get("storage", 0))

    @property
    def bound(self) -> str:
        """The part that a faster one of would help most."""
        parts = self.parts
        slowest = max((parts.get(name, 0.0), name) for name in ("decode", "storage"))
        if slowest[0] >= self.seconds:
            return slowest[1]
        return "compute" if parts["compute"] >= parts.get("communication", 0) else "communication"


def memory_of(job: Job, device: Device, stage: int, checkpointing: bool) -> Memory:
    """What a rank holds, and how many images fit beside it."""
    state = state_bytes(job.model, stage, job.ranks)
    image = activation_bytes(job.model, checkpointing, device.element)
    free = device.memory_bytes - RESERVED_BYTES - sum(state)
    return Memory(state, image, max(0, int(free // image)))


def micro_batches_of(job: Job, largest: int) -> int:
    """Of a rank and step, as `maelstream.jobs.pretrain` cuts them."""
    return math.ceil(math.ceil(job.batch_size / job.ranks) / largest)


def step_of(job: Job, device: Device, micro_batches: int) -> Step:
    """The step of one rank, which takes batch_size / ranks images in `micro_batches`."""
    images = job.batch_size / job.ranks
    flops = training_flops(job.model) + (recomputed_flops(job.model) if job.checkpointing else 0)
    memory_bytes_per_s = device.memory_bytes_per_s * device.bandwidth_share
    ring = device.ring_bytes_per_s(job.ranks)
    sent = traffic(job.model, job.stage, job.ranks, micro_batches).sent(job.ranks)
    return Step(
        products=images * flops / (device.flops_per_s * device.matrix_share),
        moves=images * moved_bytes(job.model, job.checkpointing, device.element) / memory_bytes_per_s,
        optimizer=update_bytes(parameter_count(job.model), job.stage, job.ranks) / memory_bytes_per_s,
        communication=0.0 if job.ranks == 1 else None if ring is None else sent / ring,
        decode=None if device.decode_images_per_s is None else images / device.decode_images_per_s,
        storage=None if job.storage_bytes_per_s is None else job.batch_size * job.image_bytes / job.storage_bytes_per_s,
    )


def figures_of(job: Job, device: Device, micro_batch: int) -> dict[str, Any]:
    """Everything that the command tells, by name, with units in the names."""
    micro_batches = micro_batches_of(job, micro_batch)
    step = step_of(job, device, micro_batches)
    images_per_s = job.batch_size / step.seconds
    return {
        "micro_batch": micro_batch,
        "micro_batches": micro_batches,
        "step_s": step._asdict(),
        "images_per_s": images_per_s,
        "storage_bytes_per_s": images_per_s * job.image_bytes,
        "mfu": images_per_s / job.ranks * training_flops(job.model) / device.flops_per_s,
        "communication_over_compute": None
        if step.communication is None
        else step.communication / step.parts["compute"],
        "hours": job.samples / images_per_s / 3600,
        "bound": step.bound,
    }


def count_of(text: str) -> float:
    """1.28M, 400M, 5B, 50k or plain digits. RecipeError for anything else, and for nothing."""
    factor = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower(), 1.0)
    try:
        count = float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        count = 0.0
    if not 1 <= count < math.inf:
        raise RecipeError(f"--dataset-size {text} is no number of images; write it as 1.28M, 400M or 5B")
    return count


def model_of(name: str) -> MAEConfig:
    """A model of the paper, or that of a recipe."""
    if name in MODELS:
        return MODELS[name]
    if not name.endswith((".yaml", ".yml")):
        raise RecipeError(f"--model {name} is none of {', '.join(MODELS)}, and no recipe (*.yaml)")
    return load_recipe(Path(name)).model


def device_of(command: Plan) -> Device:
    """The one that is planned for; measured here if that is asked for."""
    if command.gpu != "here" and command.gpu not in DEVICES:
        raise RecipeError(f"--gpu {command.gpu} is none of {', '.join(DEVICES)}, here")
    device = measure_this_machine() if command.gpu == "here" else DEVICES[command.gpu]
    if command.decode_images_per_s is None:
        return device
    return Device(**asdict(device) | {"decode_images_per_s": command.decode_images_per_s})


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f}"


def memory_table(job: Job, device: Device) -> Table:
    """One rank's memory at each stage of ZeRO, and what fits beside it."""
    stages = (1, 2, 3)
    plain, saving = ([memory_of(job, device, stage, each) for stage in stages] for each in (False, True))
    title = f"GB of one {device.name} of {job.ranks:,}; {device.memory_bytes / 1e9:,.0f} are there"
    table = Table("", *(f"ZeRO {stage}{' *' if stage == job.stage else ''}" for stage in stages), title=title)
    for name in StateBytes._fields:
        table.add_row(name, *(gigabytes(getattr(each.state, name)) for each in plain))
    table.add_row("all", *(gigabytes(sum(each.state)) for each in plain), style="bold")
    for name, memories in {"largest micro-batch": plain, "with activation checkpointing": saving}.items():
        table.add_row(name, *(f"{each.largest:,}" if each.largest else "does not fit" for each in memories))
    return table


def step_table(step: dict[str, float | None], seconds: float) -> Table:
    """The parts of a step."""
    table = Table("part of a step", "ms", "of the step")
    for name, part in step.items():
        known = ("not known", "") if part is None else (f"{1e3 * part:,.2f}", f"{part / seconds:.0%}")
        table.add_row(name, *known)
    return table


def show(job: Job, device: Device, memory: Memory, figures: dict[str, Any]) -> None:
    """The tables, and the verdict in words."""
    console = Console()
    console.print(memory_table(job, device))
    console.print(
        f"activations of an image: {memory.image / 1e6:,.1f} MB"
        f"{' with activation checkpointing' if job.checkpointing else ''}; "
        f"micro-batch {figures['micro_batch']:,}, {figures['micro_batches']:,} a step and GPU"
    )
    console.print(step_table(figures["step_s"], job.batch_size / figures["images_per_s"]))
    ratio = figures["communication_over_compute"]
    console.print(
        f"{figures['images_per_s']:,.0f} images/s ({figures['images_per_s'] / job.ranks:,.0f} a GPU), "
        f"{figures['storage_bytes_per_s'] / 1e9:,.2f} GB/s from storage, MFU {figures['mfu']:.0%}, "
        f"communication / compute {'not known' if ratio is None else f'{ratio:.2f}'}"
    )
    console.print(f"{job.samples:,.0f} images take {figures['hours']:,.1f} hours; the bound: {figures['bound']}")


def main(args: list[str]) -> int:
    """`maelstream plan`."""
    command = parsed(Plan, args, "plan")
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
            f"a batch of {command.batch_size} images cannot be shared by {command.gpus} GPUs; use fewer GPUs or a "
            "larger --batch-size"
        )
    samples = command.epochs * count_of(command.dataset_size)
    storage = None if command.storage_gb_per_s is None else 1e9 * command.storage_gb_per_s
    model, device = model_of(command.model), device_of(command)
    job = Job(
        model,
        command.gpus,
        command.zero,
        command.batch_size,
        command.activation_checkpointing,
        samples,
        command.image_bytes,
        storage,
    )
    memory = memory_of(job, device, job.stage, job.checkpointing)
    if memory.largest < (command.micro_batch_size or 1):
        fits = f"micro-batches up to {memory.largest}" if memory.largest else "no image"
        raise RecipeError(
            f"one {device.name} fits {fits} beside {gigabytes(sum(memory.state))} GB of state at ZeRO {job.stage}, "
            f"with {memory.image / 1e6:,.1f} MB of activations an image; take a smaller micro-batch, more GPUs, "
            "another --zero or --activation-checkpointing"
        )
    share = math.ceil(job.batch_size / job.ranks)
    figures = figures_of(job, device, min(command.micro_batch_size or memory.largest, share))
    if command.json:
        stages = {stage: memory_of(job, device, stage, job.checkpointing) for stage in (1, 2, 3)}
        state = {f"zero_{stage}": each.state._asdict() | {"largest": each.largest} for stage, each in stages.items()}
        print(json.dumps({"device": asdict(device), "activation_bytes": memory.image, "state_bytes": state} | figures))
        return 0
    show(job, device, memory, figures)
    return 0
