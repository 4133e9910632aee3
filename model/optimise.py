"""What the optimiser is told: which parameters decay, and the learning rate of a step (paper, appendix A.1)."""

import math

from torch import nn


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for AdamW: first those without decay (biases and every other 1-D tensor), then the rest.

    Class and mask token are 3-D and do decay, as in the reference implementation; frozen parameters are left out.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    still = {name for name, parameter in trained if parameter.ndim <= 1 or name.endswith(".bias")}
    return [
        {"params": [parameter for name, parameter in trained if name in still], "weight_decay": 0.0},
        {"params": [parameter for name, parameter in trained if name not in still], "weight_decay": weight_decay},
    ]


def lr_at(step: int, *, peak: float, floor: float, warmup_steps: float, total_steps: int) -> float:
    """Learning rate of `step` (from 0): linear from 0 to `peak` in the warm-up, then half a cosine down to `floor`.

    Steps are iterations: the reference's fractional epoch is step / steps per epoch, so `warmup_steps` is warm-up
    epochs x steps per epoch. The rate is set before the step, so step 0 of a warm-up moves nothing, and `floor` itself
    belongs to step `total_steps`, the first that is no longer run.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2
