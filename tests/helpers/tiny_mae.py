"""A masked autoencoder of 32 x 32 pixels that runs in milliseconds, and images for it."""

import dataclasses
from typing import Any

import torch

from maelstream.model.config import MAEConfig
from maelstream.model.mae import MAE

TINY = MAEConfig(
    image_size=(32, 32), patch_size=8, dim=32, depth=2, heads=4, decoder_dim=16, decoder_depth=1, decoder_heads=2
)


def tiny(**options: Any) -> MAE:
    """A freshly initialised `TINY` model with some fields changed."""
    return MAE(dataclasses.replace(TINY, **options))


def batch(config: MAEConfig, size: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Random uint8 images (B, C, H, W) and mask keys (B,)."""
    generator = torch.Generator().manual_seed(0)
    shape = (size, config.in_chans, *config.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), torch.arange(size) * 7 - 5
