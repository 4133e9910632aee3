"""Mixup and CutMix (arXiv 1710.09412, 1905.04899) as MAE's fine-tuning uses them: timm's, on the device, stateless.

timm draws from numpy's global generator. For the length of the call, that generator is seeded from the batch's first
mask key, then restored, so mixup too is a pure function of (seed, epoch, sample). Pairs are formed inside a rank's
micro-batch (the first image with the last, and so on). Unlike crops, they depend on how the batch is split.
"""

import numpy as np
from jaxtyping import Float, Int64
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from maelstream.pipeline.config import MixupConfig


def apply_mixup(
    images: Float[Tensor, "b 3 h w"],
    labels: Int64[Tensor, "b"],
    keys: Int64[Tensor, "b"],
    classes: int,
    config: MixupConfig,
) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b classes"]]:
    """Applies mixup or CutMix to `images` in place; returns them and their target distributions.

    `keys` are the batch's mask keys, on the CPU.
    """
    share = 1.0
    if config.mixup or config.cutmix:
        mixup = Mixup(config.mixup, config.cutmix, num_classes=classes, label_smoothing=config.label_smoothing)
        before = np.random.get_state()
        np.random.seed(int(keys[0]) & 0xFFFFFFFF)
        try:
            share = mixup._mix_batch(
                images
            )  # `mixup(...)` rejects odd batches; their middle image is mixed with itself
        finally:
            np.random.set_state(before)
    return images, mixup_target(labels, classes, share, config.label_smoothing)
