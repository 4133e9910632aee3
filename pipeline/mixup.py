"""Mixup and CutMix (arXiv 1710.09412, 1905.04899) as MAE fine-tunes with them: timm's, on the device, without state.

timm draws from numpy's global generator. Here that is seeded, for the length of the call, from the batch's first mask
key, so that the mixing too is a pure function of (seed, epoch, sample), and put back. Pairs are made inside a rank's
micro-batch (each image with the one at the other end), so that, unlike crops, they depend on how the batch is cut.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor


@dataclass(frozen=True)
class MixupConfig:
    """The defaults are the paper's (table 9)."""

    mixup: float = 0.8
    """Alpha of the Beta distribution that the share of the first image is drawn from; 0: no mixup."""
    cutmix: float = 1.0
    """Likewise of the share of the area; 0: no CutMix. Where both are on, half the batches get the one."""
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if min(self.mixup, self.cutmix) < 0 or not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"mixup {self.mixup} and cutmix {self.cutmix} must not be negative, label_smoothing "
                f"{self.label_smoothing} in 0..1"
            )


def mixed(
    images: Float[Tensor, "b 3 h w"],
    labels: Int64[Tensor, "b"],
    keys: Int64[Tensor, "b"],
    classes: int,
    config: MixupConfig,
) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b classes"]]:
    """Mixed images, in the memory of `images`, and the target of each; `keys` (on the CPU) are the batch's."""
    share = 1.0
    if config.mixup or config.cutmix:
        mix = Mixup(config.mixup, config.cutmix, num_classes=classes, label_smoothing=config.label_smoothing)
        before = np.random.get_state()
        np.random.seed(int(keys[0]) & 0xFFFFFFFF)
        try:
            share = mix._mix_batch(images)  # `mix(...)` refuses odd batches, whose middle image is mixed with itself
        finally:
            np.random.set_state(before)
    return images, mixup_target(labels, classes, share, config.label_smoothing)
