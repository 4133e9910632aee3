"""Floating-point operations of one image, from the configuration: what a step should cost, and the MFU's numerator.

A multiply-add counts as two. Matrix products alone are counted, as torch's FlopCounterMode does, and the two agree to
the last digit; the counter itself sees nothing of fused attention on a CPU.
"""

from typing import NamedTuple

from maelstream.model.config import MAEConfig


class Flops(NamedTuple):
    """One image's operations by part of the model."""

    encoder: int
    """Patch embedding and blocks."""
    decoder: int
    """The projection of the latent, and blocks."""
    head: int


def forward_by_part(config: MAEConfig) -> Flops:
    """One image forward. An encoder with mask tokens sees every place, and so does then the decoder's projection."""
    everything, removed = 1 + config.num_patches, config.num_patches - config.keep
    encoded = everything if config.encoder_mask_tokens else 1 + config.keep
    return Flops(
        _embed_flops(config) + config.depth * _block_flops(encoded, config.dim, config.mlp_ratio),
        2 * encoded * config.dim * config.decoder_dim
        + config.decoder_depth * _block_flops(everything, config.decoder_dim, config.mlp_ratio),
        2 * removed * config.decoder_dim * config.target_dim,
    )


def backward_by_part(config: MAEConfig) -> Flops:
    """One image backward: every product has two gradients, but the pixels need none."""
    encoder, decoder, head = forward_by_part(config)
    return Flops(2 * encoder - _embed_flops(config), 2 * decoder, 2 * head)


def forward_flops(config: MAEConfig) -> int:
    """One image through encoder, decoder and head, without what the target costs to compute (docs/targets.md)."""
    return sum(forward_by_part(config))


def training_flops(config: MAEConfig) -> int:
    """One image forward and backward; activation checkpointing's second forward is not counted."""
    return forward_flops(config) + sum(backward_by_part(config))


def recomputed_flops(config: MAEConfig) -> int:
    """What activation checkpointing adds to `training_flops` of one image: its blocks forward once more.

    Without each block's last product, whose result nothing in the backward pass asks for: torch stops before it.
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
    attention = 2 * tokens * dim  # scores, and their sum over the values; all heads together
    return 2 * tokens * (projections + mlp + attention)
