"""Stub until w-evaluate's."""

from dataclasses import dataclass

import torch

from model.patches import normalise
from pipeline.draws import AugmentDraws, CropConfig
from pipeline.line import Slices
from pipeline.loader import PretrainLoader
from pipeline.order import SampleOrder


@dataclass(frozen=True)
class Scores:
    top1: float
    top5: float
    images: int


@torch.no_grad()
def scores_of(model, recipe, val, council, ranks):
    n, micro = len(val), 2 * recipe.engine.micro_batch_size
    micro = min(micro, n)
    size = recipe.model.image_size
    margin = recipe.data.crop.margin
    steps = -(-n // micro)
    draws = AugmentDraws(0, CropConfig(kind="none", margin=margin), size)
    counts = None
    device = next(model.parameters()).device
    loader = PretrainLoader(
        val, SampleOrder(n, 0, "none"), draws, size, Slices(micro, 1, 1), 0, recipe.loader.threads or ranks.threads, 4
    )
    with loader:
        seen = 0
        for number, batch in enumerate(loader):
            if number == steps:
                break
            take = min(micro, n - seen)
            seen += take
            levels = normalise(batch.images[:take].to(device), recipe.data.mean, recipe.data.std)
            logits = model(levels)
            logits = logits if logits.ndim == 3 else logits[None]
            labels = torch.from_numpy(batch.labels[:take]).long().to(device)
            top = logits.topk(min(5, logits.shape[-1]), -1).indices == labels[None, :, None]
            now = torch.stack([top[..., 0].sum(1), top.any(-1).sum(1)], 1)
            counts = now if counts is None else counts + now
    return [Scores(100 * a / n, 100 * b / n, n) for a, b in counts.tolist()]
