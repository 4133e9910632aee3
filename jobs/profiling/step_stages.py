"""The stages of the training step, each alone at its limit: copy, step, optimizer, comm.

`step` is the bare model, forward and backward, with the parameters' dtype that DeepSpeed gives them; what its engine
adds shows beside it.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maelstream.jobs.distributed.ranks import Ranks
from maelstream.jobs.hardware import free_bytes, synchronise
from maelstream.jobs.profiling.data_stages import rate
from maelstream.jobs.recipe import Recipe, RecipeError
from maelstream.jobs.training.engine import Float32Arithmetic, build_model
from maelstream.model.mae import MAE
from maelstream.model.memory import activation_bytes, state_bytes
from maelstream.model.targets import PCATarget, TokenTarget
from maelstream.model.transformer import choose_attention

_WARM_UP = 2  # steps: the first ones fill pools, and compile
ADAMW_BYTES = 28  # a parameter: gradient, weight and two moments read, weight and moments written, 4 bytes each


class Images(NamedTuple):
    """A micro-batch that lies on the device."""

    images: Tensor  # (B, 3, H, W) uint8
    keys: Tensor  # (B,)

    @classmethod
    def made(cls, count: int, recipe: Recipe, device: torch.device) -> "Images":
        """Noise."""
        shape = (count, recipe.model.in_chans, *recipe.model.image_size)
        generator = torch.Generator().manual_seed(recipe.seed)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return cls(images.to(device), torch.arange(count, device=device))


def bare_model(recipe: Recipe, target: PCATarget | TokenTarget | None, device: torch.device) -> MAE:
    """The model as the engine trains it, without the engine."""
    model = build_model(recipe, target).to(device)
    if recipe.engine.precision == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        choose_attention(model, recipe.model.attention, device)
    if recipe.engine.compile:
        model.compile()
    return model


def arithmetic(model: MAE, recipe: Recipe) -> torch.dtype:
    """In what the model's matrices are multiplied."""
    bf16 = recipe.engine.precision == "bf16" and not isinstance(model, Float32Arithmetic)
    return torch.bfloat16 if bf16 else torch.float32


def copy_rate(count: int, recipe: Recipe, device: torch.device, seconds: float) -> float:
    """Images/s of micro-batches from the loader's memory to the device."""
    images = Images.made(count, recipe, torch.device("cpu")).images

    def copy(_: int) -> None:
        images.to(device, non_blocking=True)
        synchronise(device)

    return rate(copy, count, seconds)


def step_rate(model: MAE, batch: Images, device: torch.device, seconds: float) -> float:
    """Images/s forward and backward, by the median step.

    Raises:
        RecipeError: the micro-batch does not fit; the line tells the largest that does.
    """

    def run(images: Tensor, keys: Tensor) -> None:
        model(images, keys).backward()
        for parameter in model.parameters():
            parameter.grad = None
        synchronise(device)

    def step(_: int) -> None:
        began = time.perf_counter()
        run(*batch)
        times.append(time.perf_counter() - began)

    times: list[float] = []
    try:
        rate(step, len(batch.keys), seconds, _WARM_UP)
        return len(batch.keys) / statistics.median(times[_WARM_UP:])
    except torch.OutOfMemoryError:
        pass  # outside of the handler, whose traceback keeps the activations alive
    model.zero_grad(set_to_none=True)
    most = largest_that_fits(lambda count: run(batch.images[:count], batch.keys[:count]), len(batch.keys))
    raise does_not_fit(len(batch.keys), most, device)


def largest_that_fits(run: Callable[[int], None], too_many: int) -> int:
    """Most images, below `too_many`, that `run` takes without running out of the device's memory; 0 for none."""
    fits = 0
    while too_many - fits > 1:
        count = (fits + too_many) // 2
        try:
            run(count)
            fits = count
        except torch.OutOfMemoryError:
            too_many = count
    return fits


def fitting_images(recipe: Recipe, ranks: int, free: float) -> int:
    """Largest micro-batch of one of `ranks` ranks beside its state in `free` bytes, by formula; 0 for none."""
    bf16 = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    element = 2 if recipe.engine.precision == "bf16" and bf16 else 4
    state = sum(state_bytes(recipe.model, recipe.engine.zero, ranks)[:5])
    image = activation_bytes(recipe.model, recipe.engine.activation_checkpointing, element)
    return max(0, int((free - state) // image))


def check_memory(recipe: Recipe, micro_batch: int, ranks: Ranks) -> None:
    """Of a CPU's memory, before it is used: a system that has none left kills, and not only the one who took it.

    Raises:
        RecipeError: as `step_rate`.
    """
    device = torch.device("cpu")
    most = fitting_images(recipe, ranks.world_size, free_bytes(device) / ranks.local_world_size)
    if micro_batch > most:
        raise does_not_fit(micro_batch, most, device)


def does_not_fit(micro_batch: int, most: int, device: torch.device) -> RecipeError:
    """With the largest micro-batch that does."""
    advice = f"the largest that does is {most}: --engine.micro-batch-size {most}" if most else "not even 1 does"
    return RecipeError(
        f"engine.micro_batch_size {micro_batch} does not fit into the memory of {device}; {advice}, or "
        "--engine.activation-checkpointing"
    )


class EngineTimes(NamedTuple):
    """Of the engine on one batch that lies on the device, without a loader; medians."""

    micro_batch_s: float
    """Forward and backward."""
    optimizer_s: float
    """What a step does once: AdamW, and what its ranks exchange of weights."""


def engine_times(engine: Any, batch: Images, micro_batches: int, steps: int) -> EngineTimes:
    """Takes `steps` steps, past two that do not count; all ranks take as many."""
    gradients, updates = [], []
    for _ in range(_WARM_UP + steps):
        for number in range(micro_batches):
            began = time.perf_counter()
            engine.backward(engine(*batch))
            if number + 1 < micro_batches:
                engine.step()
            synchronise(engine.device)
            gradients.append(time.perf_counter() - began)
        began = time.perf_counter()
        engine.step()
        synchronise(engine.device)
        updates.append(time.perf_counter() - began)
    return EngineTimes(statistics.median(gradients[_WARM_UP * micro_batches :]), statistics.median(updates[_WARM_UP:]))


def all_reduce_s(count: int, device: torch.device, repeats: int) -> float:
    """Median seconds to sum `count` float32 gradients over all ranks."""
    gradients = torch.zeros(count, device=device)
    times = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        torch.distributed.all_reduce(gradients)
        synchronise(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
