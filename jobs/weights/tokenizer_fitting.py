"""Trains the discrete VAE whose codes the target "token" predicts; the body of `maelstream fit-tokenizer`.

Training follows DALL-E (arXiv 2102.12092, appendix A.2) on a smaller scale: the lengths of its schedules are kept as
fractions of the number of steps.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Int64, UInt8
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from maelstream.jobs.recipe import RecipeError
from maelstream.jobs.training.image_stream import image_stream, recipe_with
from maelstream.jobs.weights.target_file import tokenizer_file
from maelstream.jobs.weights.tokenizer_options import FitTokenizer
from maelstream.model.optimise import lr_at
from maelstream.model.tokenizer import Decoder, Encoder, TokenizerConfig, initialise, resize_to_grid, vae_loss
from maelstream.pipeline.decode import decode_device
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError

_DIVERGENCE_WEIGHT, _LOWEST_TEMPERATURE = 6.6, 1 / 16
# Fractions of the steps.
_LR_WARM_UP, _DIVERGENCE_RAMP, _COOLING, _COLLAPSE_CHECKED_FROM = 0.01, 0.1, 0.75, 0.5


def fit(command: FitTokenizer, dataset: Dataset) -> None:
    """Trains a tokenizer on `dataset`, prints progress and writes the file `command.out`.

    Raises:
        MaelstreamError: an invalid recipe or shape, or codes that collapsed; no file is written.
    """
    recipe = recipe_with(command.recipe, target="token", codes=command.codes)
    config, device = recipe.model, decode_device(recipe.loader.decode)
    try:
        shape = TokenizerConfig(config.codes, command.hidden, config.in_chans)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    with torch.device(device):
        encoder, decoder = Encoder(shape), Decoder(shape)
    initialise(encoder, recipe.seed)
    initialise(decoder, recipe.seed)
    console = Console(markup=False, emoji=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with (
        image_stream(dataset, recipe, command.batch_size, command.threads) as images,
        Progress(*columns, console=console, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("fit-tokenizer", total=command.steps)
        for now in train(command, encoder, decoder, config.grid, recipe.seed, images):
            text = (
                f"reconstruction {now.reconstruction:.4f}  divergence {now.divergence:.2f} nats  "
                f"{now.used:,} of {shape.codes:,} codes used, perplexity {now.perplexity:,.1f}"
            )
            bar.update(task, completed=now.step, description=text)
            if not console.is_terminal:
                print(f"step {now.step}/{command.steps}  {text}", flush=True)
            if now.step >= _COLLAPSE_CHECKED_FROM * command.steps and collapsed(now.perplexity, shape.codes):
                raise MaelstreamError(
                    f"the codes collapsed: at step {now.step} the perplexity of {shape.codes:,} codes is "
                    f"{now.perplexity:.1f}; no file was written; try another --lr, a larger --hidden, fewer --codes or "
                    "more varied images"
                )
    settings = {
        "codes": shape.codes,
        "hidden": shape.hidden,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "dataset": dataset.fingerprint,
        "images": command.steps * command.batch_size,
        "seed": recipe.seed,
    }
    tokenizer_file(command.out, encoder, decoder, settings).write(command.out)
    console.print(f"{command.out}: {shape.codes:,} codes, encoder and decoder", soft_wrap=True)


class FitProgress(NamedTuple):
    """Means over the steps since the previous line of output."""

    step: int
    reconstruction: float
    divergence: float
    perplexity: float
    used: int
    """Number of codes that were the most likely code somewhere."""


def perplexity(counts: Int64[Tensor, "codes"]) -> float:
    """Perplexity of the code usage: the number of equally used codes with the same entropy."""
    shares = counts.double() / counts.sum()
    return math.exp(-torch.special.xlogy(shares, shares).sum().item())


def collapsed(value: float, codes: int) -> bool:
    """Whether the perplexity `value` is below 0.2 % of the codes, so that they carry almost no information."""
    return value < max(2.0, 0.002 * codes)


def anneal(step: int, steps: int) -> tuple[float, float]:
    """Temperature and divergence weight of `step` (from 0): half a cosine from 1 to 1/16, and from 0 to 6.6."""
    cooled = min(1.0, step / (_COOLING * steps))
    temperature = _LOWEST_TEMPERATURE + (1 - _LOWEST_TEMPERATURE) * (1 + math.cos(math.pi * cooled)) / 2
    ramped = min(1.0, step / (_DIVERGENCE_RAMP * steps))
    return temperature, _DIVERGENCE_WEIGHT * (1 - math.cos(math.pi * ramped)) / 2


def train(
    command: FitTokenizer,
    encoder: Encoder,
    decoder: Decoder,
    grid: tuple[int, int],
    seed: int,
    images: Iterator[Tensor],
) -> Iterator[FitProgress]:
    """Train encoder and decoder in place; yield progress every `log_every` steps and after the last step."""
    device = next(encoder.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=1e-4, fused=True)
    counts = torch.zeros(encoder.config.codes, dtype=torch.int64, device=device)
    sums, since = torch.zeros(2, device=device), 0
    for step in range(command.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(
                step,
                peak=command.lr,
                floor=command.lr / 80,
                warmup_steps=_LR_WARM_UP * command.steps,
                total_steps=command.steps,
            )
        batch: UInt8[Tensor, "b 3 h w"] = next(images)
        loss = vae_loss(
            encoder, decoder, resize_to_grid(batch.float() / 255, grid), *anneal(step, command.steps), generator
        )
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        counts += loss.codes.flatten().bincount(minlength=len(counts))
        sums += torch.stack([loss.reconstruction, loss.divergence]).detach()
        since += 1
        if (step + 1) % command.log_every == 0 or step + 1 == command.steps:
            reconstruction, divergence = (sums / since).tolist()
            yield FitProgress(step + 1, reconstruction, divergence, perplexity(counts), int((counts > 0).sum()))
            counts.zero_()
            sums, since = torch.zeros_like(sums), 0
