"""Floating-point operations of one image, from the configuration: what a step should cost, and the MFU's numerator.

A multiply-add counts as two. Matrix products alone are counted, as torch's FlopCounterMode does, and the two agree to
the last digit; the counter itself sees nothing of fused attention on a CPU.
"""

from model.mae import MAEConfig


def forward_flops(config: MAEConfig) -> int:
    """One image through encoder, decoder and head, without what the target costs to compute (docs/targets.md)."""
    visible, everything, removed = 1 + config.keep, 1 + config.num_patches, config.num_patches - config.keep
    return (
        _embed_flops(config)
        + config.depth * _block_flops(visible, config.dim, config.mlp_ratio)
        + 2 * visible * config.dim * config.decoder_dim
        + config.decoder_depth * _block_flops(everything, config.decoder_dim, config.mlp_ratio)
        + 2 * removed * config.decoder_dim * config.target_dim
    )


def training_flops(config: MAEConfig) -> int:
    """One image forward and backward: every product has two gradients, but the pixels need none."""
    return 3 * forward_flops(config) - _embed_flops(config)


def _embed_flops(config: MAEConfig) -> int:
    return 2 * config.keep * config.patch_dim * config.dim


def _block_flops(tokens: int, dim: int, mlp_ratio: float) -> int:
    projections = 4 * dim * dim  # query, key, value, output
    mlp = 2 * dim * int(dim * mlp_ratio)
    attention = 2 * tokens * dim  # scores, and their sum over the values; all heads together
    return 2 * tokens * (projections + mlp + attention)
