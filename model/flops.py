"""Floating-point operations per image, computed from the configuration; the numerator of MFU.

A multiply-add counts as two operations. Only matrix products count, as in torch's FlopCounterMode; both give exactly
the same number. The counter itself does not see fused attention on a CPU. This module does not import torch.
"""

from typing import NamedTuple

from maelstream.model.config import MAEConfig


class Flops(NamedTuple):
    """Operations per image, by part of the model."""

    encoder: int
    """Patch embedding and blocks."""
    decoder: int
    """Projection of the latent, and blocks."""
    head: int


def forward_by_part(config: MAEConfig) -> Flops:
    """Forward operations per image. With encoder mask tokens, encoder and projection process all positions."""
    everything, removed = 1 + config.num_patches, config.num_patches - config.keep
    encoded = everything if config.encoder_mask_tokens else 1 + config.keep
    return Flops(
        _embed_flops(config) + config.depth * _block_flops(encoded, config.dim, config.mlp_ratio),
        2 * encoded * config.dim * config.decoder_dim
        + config.decoder_depth * _block_flops(everything, config.decoder_dim, config.mlp_ratio),
        2 * removed * config.decoder_dim * config.target_dim,
    )


def backward_by_part(config: MAEConfig) -> Flops:
    """Backward operations per image: two gradients per product, except that pixels need no gradient."""
    encoder, decoder, head = forward_by_part(config)
    return Flops(2 * encoder - _embed_flops(config), 2 * decoder, 2 * head)


def forward_flops(config: MAEConfig) -> int:
    """Forward operations per image, without those that compute the target (docs/targets.md)."""
    return sum(forward_by_part(config))


def training_flops(config: MAEConfig) -> int:
    """Forward and backward operations per image, without the second forward pass of activation checkpointing."""
    return forward_flops(config) + sum(backward_by_part(config))


def recomputed_flops(config: MAEConfig) -> int:
    """Operations that activation checkpointing adds to `training_flops` per image: a second forward pass of the blocks.

    The last product of each block is not recomputed: the backward pass does not need its result, and torch stops early.
    """
    everything, kept = 1 + config.num_patches, 1 + config.keep
    encoder = _recomputed_block(everything if config.encoder_mask_tokens else kept, config.dim, config.mlp_ratio)
    decoder = _recomputed_block(everything, config.decoder_dim, config.mlp_ratio)
    return config.depth * encoder + config.decoder_depth * decoder


def _recomputed_block(tokens: int, dim: int, mlp_ratio: float) -> int:
    return _block_flops(tokens, dim, mlp_ratio) - 2 * tokens * int(dim * mlp_ratio) * dim


def _embed_flops(config: MAEConfig) -> int:
    return 2 * config.keep * config.patch_dim * config.dim


def _block_flops(tokens: int, dim: int, mlp_ratio: float) -> int:
    projections = 4 * dim * dim  # query, key, value, output
    mlp = 2 * dim * int(dim * mlp_ratio)
    attention = 2 * tokens * dim  # scores and the weighted sum of values, over all heads
    return 2 * tokens * (projections + mlp + attention)
