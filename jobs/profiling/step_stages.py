"""Measures the stages of the training step, each alone: copy, step, optimizer, comm.

`step` is forward and backward of the model without DeepSpeed's engine, with parameters in the dtype that the engine
gives them. The engine is timed as well, so the difference is what the engine adds.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maelstream.jobs.distributed.ranks import Ranks
from maelstream.jobs.hardware import free_bytes, multiplies_bf16, process_device, synchronise
from maelstream.jobs.profiling.data_stages import measure_rate
from maelstream.jobs.recipe import Recipe, RecipeError
from maelstream.jobs.training.engine import Float32Arithmetic, build_model
from maelstream.model.mae import MAE
from maelstream.model.memory import activation_bytes, state_bytes
from maelstream.model.targets import PCATarget, TokenTarget
from maelstream.model.transformer import choose_attention

_WARM_UP = 2  # steps: the first ones fill memory pools and compile


class DeviceBatch(NamedTuple):
    """A micro-batch that is already on the device."""

    images: Tensor  # (B, 3, H, W) uint8
    keys: Tensor  # (B,)

    @classmethod
    def random(cls, count: int, recipe: Recipe, device: torch.device) -> "DeviceBatch":
        """`count` images of random pixels."""
        shape = (count, recipe.model.in_chans, *recipe.model.image_size)
        generator = torch.Generator().manual_seed(recipe.seed)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return cls(images.to(device), torch.arange(count, device=device))


def model_without_engine(recipe: Recipe, target: PCATarget | TokenTarget | None, device: torch.device) -> MAE:
    """The model with the dtypes and the attention that it has inside DeepSpeed's engine, but without the engine."""
    model = build_model(recipe, target).to(device)
    if recipe.engine.precision == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        choose_attention(model, recipe.model.attention, device)
    if recipe.engine.compile:
        model.compile()
    return model


def compute_dtype(model: MAE, recipe: Recipe) -> torch.dtype:
    """The dtype in which the model multiplies matrices."""
    bf16 = recipe.engine.precision == "bf16" and not isinstance(model, Float32Arithmetic)
    return torch.bfloat16 if bf16 else torch.float32


def copy_rate(count: int, recipe: Recipe, device: torch.device, seconds: float) -> float:
    """Images/s of copying micro-batches from the loader's memory to the device."""
    images = DeviceBatch.random(count, recipe, torch.device("cpu")).images

    def copy(_: int) -> None:
        images.to(device, non_blocking=True)
        synchronise(device)

    return measure_rate(copy, count, seconds)


def step_rate(model: MAE, batch: DeviceBatch, device: torch.device, seconds: float) -> float:
    """Images/s of forward and backward, from the median step.

    Raises:
        RecipeError: the micro-batch does not fit into memory; the message names the largest one that does.
    """

    def step(_: int) -> None:
        began = time.perf_counter()
        _forward_and_backward(model, batch, device)
        times.append(time.perf_counter() - began)

    times: list[float] = []
    try:
        measure_rate(step, len(batch.keys), seconds, _WARM_UP)
        return len(batch.keys) / statistics.median(times[_WARM_UP:])
    except torch.OutOfMemoryError:
        pass  # continue outside of the handler, whose traceback keeps the activations alive
    model.zero_grad(set_to_none=True)
    most = largest_fitting_batch(
        lambda count: _forward_and_backward(model, DeviceBatch(batch.images[:count], batch.keys[:count]), device),
        len(batch.keys),
    )
    raise too_large_error(len(batch.keys), most, device)


def largest_fitting_batch(run: Callable[[int], None], too_many: int) -> int:
    """The most images, below `too_many`, for which `run` does not run out of the device's memory; 0 if none fit."""
    fits = 0
    while too_many - fits > 1:
        count = (fits + too_many) // 2
        try:
            run(count)
            fits = count
        except torch.OutOfMemoryError:
            too_many = count
    return fits


def largest_micro_batch(recipe: Recipe, ranks: int, free: float) -> int:
    """The largest micro-batch that fits into `free` bytes with one of `ranks` ranks' state, by formula; 0 if none."""
    bf16 = multiplies_bf16(process_device())
    element = 2 if recipe.engine.precision == "bf16" and bf16 else 4
    state = sum(state_bytes(recipe.model, recipe.engine.zero, ranks)[:5])
    image = activation_bytes(recipe.model, recipe.engine.activation_checkpointing, element)
    return max(0, int((free - state) // image))


def check_memory(recipe: Recipe, micro_batch: int, ranks: Ranks) -> None:
    """Checks that a micro-batch fits into a CPU's memory, before the memory is used.

    A system without free memory kills processes, and not only the one that used the memory.

    Raises:
        RecipeError: the micro-batch does not fit; the message names the largest one that does.
    """
    device = torch.device("cpu")
    most = largest_micro_batch(recipe, ranks.world_size, free_bytes(device) / ranks.local_world_size)
    if micro_batch > most:
        raise too_large_error(micro_batch, most, device)


def too_large_error(micro_batch: int, most: int, device: torch.device) -> RecipeError:
    """The error for a micro-batch that does not fit into memory; `most` is the largest that does, 0 if none."""
    advice = f"the largest that does is {most}: --engine.micro-batch-size {most}" if most else "not even 1 does"
    return RecipeError(
        f"engine.micro_batch_size {micro_batch} does not fit into the memory of {device}; {advice}, or "
        "--engine.activation-checkpointing"
    )


class EngineTimes(NamedTuple):
    """Median seconds of the engine's parts on one batch that is on the device; no loader runs."""

    micro_batch_s: float
    """Forward and backward."""
    optimizer_s: float
    """Once per step: AdamW, and the exchange of weights between ranks."""
    share: float | None
    """Share of `micro_batch_s` that the engine adds: the median over steps, in each of which the model ran with and
    without the engine, in turns. None if it did not run without."""
    noise: float | None
    """Interquartile range of these shares."""


def time_engine(engine: Any, model: MAE | None, batch: DeviceBatch, micro_batches: int, steps: int) -> EngineTimes:
    """Takes two steps that do not count and then `steps` steps; every rank must take the same number.

    `model` is the one of `model_without_engine`; it gets the engine's weights, so both need no more memory than the
    engine. At ZeRO 3 a rank has no whole weights, so it is None.
    """
    if model is not None:
        for mine, engines in zip(model.parameters(), engine.module.parameters(), strict=True):
            mine.data = engines.data
    micro_batch_s, update_s, shares = [], [], []
    for _ in range(_WARM_UP + steps):
        for number in range(micro_batches):
            began = time.perf_counter()
            engine.backward(engine(*batch))
            if number + 1 < micro_batches:
                engine.step()
            synchronise(engine.device)
            micro_batch_s.append(time.perf_counter() - began)
        began = time.perf_counter()
        engine.step()
        synchronise(engine.device)
        update_s.append(time.perf_counter() - began)
        if model is not None:
            began = time.perf_counter()
            _forward_and_backward(model, batch, engine.device)
            shares.append(1 - (time.perf_counter() - began) / statistics.median(micro_batch_s[-micro_batches:]))
    share, noise = None, None
    if shares:
        low, share, high = statistics.quantiles(shares[_WARM_UP:], n=4, method="inclusive")
        noise = high - low
    micro_batch, update = micro_batch_s[_WARM_UP * micro_batches :], update_s[_WARM_UP:]
    return EngineTimes(statistics.median(micro_batch), statistics.median(update), share, noise)


def _forward_and_backward(model: MAE, batch: DeviceBatch, device: torch.device) -> None:
    """Runs the model without an engine; its gradients are discarded."""
    model(*batch).backward()
    for parameter in model.parameters():
        parameter.grad = None
    synchronise(device)


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
