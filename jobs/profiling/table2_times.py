"""Times of the models of the paper's table 2, and the hours that follow from them; the body of `maelstream table2`.

AdamW is timed separately from forward and backward. Hours then follow for the paper's batch, where one update comes per
4,096 images of all devices. The three models of a size share their weights, so they need the memory of one. They take
turns, so a machine that slows down slows down all of them.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maelstream.jobs.hardware import free_bytes, multiplies_bf16, synchronise
from maelstream.model.config import MAEConfig
from maelstream.model.mae import MAE
from maelstream.model.optimise import weight_decay_groups
from maelstream.model.sizes import VIT_H14, VIT_L16
from maelstream.model.transformer import choose_attention
from maelstream.shards.errors import MaelstreamError

IMAGES, EPOCHS, BATCH = 1_281_167, 800, 4096
SIZES = {
    "large": MAEConfig(**VIT_L16._asdict()),
    "huge": MAEConfig(**VIT_H14._asdict()),
}
MODELS: dict[str, dict[str, Any]] = {
    "mask tokens in the encoder, decoder 8": {"encoder_mask_tokens": True},
    "without, decoder 8": {},
    "without, decoder 1": {"decoder_depth": 1},
}
# Hours on 128 TPU-v3 cores, in the order of MODELS.
PAPER_HOURS = {"large": (42.4, 15.4, 11.6), "huge": (119.6, 34.5, 29.3)}
_WARM_UP = 1
_STATE_BYTES = 16  # per parameter: weight, gradient, two moments


class Times(NamedTuple):
    """Median seconds of the two parts of a step."""

    gradients_s: float
    optimizer_s: float


class SharedModels(NamedTuple):
    """Models that share their parameters, and the one optimizer of all of them."""

    models: dict[str, MAE]
    optimizer: torch.optim.Optimizer


def build_shared_models(config: MAEConfig, device: torch.device) -> SharedModels:
    """Builds the three models of the table at the size of `config`."""
    first, *others = MODELS
    masked = MAE(dataclasses.replace(config, **MODELS[first])).to(device)
    mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_dim, device=device))
    weights = masked.state_dict(keep_vars=True) | {"mask_token": mask_token}
    models = {first: masked}
    for name in others:
        with torch.device("meta"):
            models[name] = MAE(dataclasses.replace(config, **MODELS[name]))
        models[name].load_state_dict(weights, assign=True, strict=False)
        choose_attention(models[name], "auto", device)
    # A model gives no gradient to parameters that it does not have, and AdamW skips those.
    groups = [*weight_decay_groups(masked, 0.05), {"params": [mask_token], "weight_decay": 0.05}]
    return SharedModels(models, torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.95), fused=True))


def measure_times(
    models: dict[str, Callable[[Tensor, Tensor], Tensor]],
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    rounds: int,
    bf16: bool,
) -> dict[str, Times]:
    """Times each model, in turns; the first round fills memory pools and does not count."""
    device, keys = images.device, torch.arange(len(images), device=images.device)
    runs: dict[str, list[Times]] = {name: [] for name in models}
    for _ in range(_WARM_UP + rounds):
        for name, model in models.items():
            synchronise(device)
            began = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = model(images, keys)
            loss.backward()
            synchronise(device)
            middle = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            synchronise(device)
            runs[name].append(Times(middle - began, time.perf_counter() - middle))
    return {name: Times(*map(statistics.median, zip(*times[_WARM_UP:], strict=True))) for name, times in runs.items()}


def images_per_s(times: Times, batch: int, devices: int) -> float:
    """Images/s of all devices together, at the paper's batch."""
    return 1 / (times.gradients_s / batch / devices + times.optimizer_s / BATCH)


def rows(size: str, times: dict[str, Times], batch: int, devices: int) -> list[dict[str, Any]]:
    """One row of the table per model, with our figures and the paper's."""
    rates = {name: images_per_s(each, batch, devices) for name, each in times.items()}
    slowest, paper = next(iter(rates.values())), PAPER_HOURS[size]
    return [
        {
            "size": size,
            "model": name,
            "gradients_s": times[name].gradients_s,
            "optimizer_s": times[name].optimizer_s,
            "images_per_s": rate,
            "hours": EPOCHS * IMAGES / rate / 3600,
            "faster_by": rate / slowest,
            "paper_faster_by": paper[0] / hours,
            "paper_hours": hours,
        }
        for (name, rate), hours in zip(rates.items(), paper, strict=True)
    ]


def measure(sizes: Sequence[str], batch: int, devices: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Measures all rows of the table; `batch` 0 is 64 on a GPU and 2 on a CPU.

    Raises:
        MaelstreamError: a size or the batch does not fit into memory.
    """
    batch = batch or (64 if device.type == "cuda" else 2)
    bf16 = multiplies_bf16(device)
    measured = []
    for size in sizes:
        config = SIZES[size]
        with torch.device("meta"):
            needed = _STATE_BYTES * sum(parameter.numel() for parameter in MAE(config).parameters())
        if needed > (free := free_bytes(device)):
            raise MaelstreamError(
                f"--size {size} needs {needed / 1e9:.1f} GB for weights, gradients and moments alone, and {device} has "
                f"{free / 1e9:.1f} GB free; use a smaller size or another machine"
            )
        generator = torch.Generator().manual_seed(0)
        shape = (batch, 3, *config.image_size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
        models, optimizer = build_shared_models(config, device)
        try:
            times = measure_times({**models}, optimizer, images, rounds, bf16)
        except torch.OutOfMemoryError:
            raise MaelstreamError(
                f"--batch {batch} of --size {size} does not fit into the memory of {device}; halve it"
            ) from None
        measured += rows(size, times, batch, devices)
        del models, optimizer
    return measured
