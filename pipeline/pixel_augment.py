"""Pixel augmentation after the crop: colour jitter, RandAugment and random erasing, from parameters drawn beforehand.

RandAugment is the variant of MAE's fine-tuning (magnitude 9, standard deviation 0.5; "increasing" operations, two per
image, each skipped half the time). Erasing is that of its paper, with noise in the box. Both follow timm's documented
behaviour with torchvision's tensor operations, so a GPU does the same as a CPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int32, Int64, UInt8
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

OPERATIONS = 15
"""Number of RandAugment's operations."""


@dataclass(frozen=True)
class PixelAugment:
    """Parameters of one batch's pixel augmentation; parts that are None are skipped."""

    jitter_factors: Float64[np.ndarray, "b 3"] | None  # for brightness, contrast, saturation
    jitter_orders: Int64[np.ndarray, "b 3"] | None  # which of them is applied first, second, third
    operations: Int64[np.ndarray, "b layers"] | None  # of RandAugment; -1: none
    magnitudes: Float64[np.ndarray, "b layers"] | None  # 0 to 10; negative: in the opposite direction
    boxes: Int32[np.ndarray, "b 4"] | None  # to erase: left, top, width, height; width 0: none
    noise_keys: Int64[np.ndarray, "b"]


def augment_pixels(
    image: UInt8[Tensor, "3 h w"],
    params: PixelAugment | None,
    index: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> UInt8[Tensor, "3 h w"]:
    """Applies pixel augmentation to image `index` of a batch; an erased box gets noise of `mean` and `std` (0 to 1)."""
    if params is None:
        return image
    if params.jitter_factors is not None and params.jitter_orders is not None:
        for kind in params.jitter_orders[index]:
            image = _JITTER[kind](image, float(params.jitter_factors[index, kind]))
    if params.operations is not None and params.magnitudes is not None:
        for operation, magnitude in zip(params.operations[index], params.magnitudes[index], strict=True):
            if operation >= 0:
                image = rand_augment(image, int(operation), float(magnitude), mean)
    if params.boxes is not None and params.boxes[index, 2]:
        left, top, width, height = params.boxes[index].tolist()
        generator = torch.Generator().manual_seed(int(params.noise_keys[index]))
        noise = torch.randn(3, height, width, generator=generator)
        levels = 255 * (noise * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None])
        image = image.clone()
        image[:, top : top + height, left : left + width] = levels.clamp(0, 255).round().to(image.device, torch.uint8)
    return image


_JITTER: tuple[Callable[[Tensor, float], Tensor], ...] = (
    v2.adjust_brightness,
    v2.adjust_contrast,
    v2.adjust_saturation,
)


def rand_augment(image: UInt8[Tensor, "3 h w"], operation: int, magnitude: float, mean: tuple[float, ...]) -> Tensor:
    """Applies one operation at a magnitude of -10 to 10; `mean` (0 to 1) fills pixels from outside the image."""
    level, fill = magnitude / 10, [round(255 * value) for value in mean]
    strength, enhancement = abs(level), max(0.1, 1 + 0.9 * level)

    def moved(angle: float = 0.0, right: float = 0.0, down: float = 0.0, shear: tuple[float, float] = (0, 0)) -> Tensor:
        height, width = image.shape[1:]
        degrees = [math.degrees(math.atan(factor)) for factor in shear]
        # PIL shears around the corner and rotates around the centre.
        centre = [0.0, 0.0] if any(shear) else None
        shift = [round(right * width), round(down * height)]
        return v2.affine(
            image,
            angle,
            shift,
            1.0,
            degrees,
            InterpolationMode.BILINEAR,
            fill,
            centre,
        )

    operations: tuple[Callable[[], Tensor], ...] = (
        lambda: v2.autocontrast(image),
        lambda: v2.equalize(image),
        lambda: v2.invert(image),
        lambda: moved(angle=-30 * level),  # PIL rotates anticlockwise
        lambda: v2.posterize(image, 4 - int(4 * strength)) if strength < 1 else torch.zeros_like(image),
        lambda: v2.solarize(image, 256 - min(256, int(256 * strength))),
        lambda: torch.where(image < 128, image + min(128, int(110 * strength)), image),
        lambda: v2.adjust_saturation(image, enhancement),
        lambda: v2.adjust_contrast(image, enhancement),
        lambda: v2.adjust_brightness(image, enhancement),
        lambda: v2.adjust_sharpness(image, enhancement),
        lambda: moved(shear=(0.3 * level, 0.0)),
        lambda: moved(shear=(0.0, 0.3 * level)),
        lambda: moved(right=-0.45 * level),
        lambda: moved(down=-0.45 * level),
    )
    return operations[operation]()
