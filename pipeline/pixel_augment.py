"""Pixel augmentation after the crop: colour jitter and RandAugment, from parameters drawn beforehand.

RandAugment is the variant of MAE's fine-tuning (magnitude 9, standard deviation 0.5; "increasing" operations, two per
image, each skipped half the time). Each operation gives the levels that timm's gives with PIL (docs/pipeline.md), on
tensors, so that a GPU does the same. Erasing comes after normalisation: `pipeline/erase.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

from maelstream.pipeline.erase import Erasing

OPERATIONS = 15
"""Number of RandAugment's operations."""


@dataclass(frozen=True)
class PixelAugment:
    """Parameters of one batch's pixel augmentation; parts that are None are skipped."""

    jitter_factors: Float64[np.ndarray, "b 3"] | None  # for brightness, contrast, saturation
    jitter_orders: Int64[np.ndarray, "b 3"] | None  # which of them is applied first, second, third
    operations: Int64[np.ndarray, "b layers"] | None  # of RandAugment; -1: none
    magnitudes: Float64[np.ndarray, "b layers"] | None  # 0 to 10; negative: in the opposite direction
    erasing: Erasing | None


def augment_pixels(
    image: UInt8[Tensor, "3 h w"], params: PixelAugment | None, index: int, mean: tuple[float, ...]
) -> UInt8[Tensor, "3 h w"]:
    """Applies all but the erasing to image `index` of a batch; `mean` (0 to 1) fills pixels from outside the image."""
    if params is None:
        return image
    if params.jitter_factors is not None and params.jitter_orders is not None:
        for kind in params.jitter_orders[index]:
            image = _JITTER[kind](image, float(params.jitter_factors[index, kind]))
    if params.operations is not None and params.magnitudes is not None:
        for operation, magnitude in zip(params.operations[index], params.magnitudes[index], strict=True):
            if operation >= 0:
                image = rand_augment(image, int(operation), float(magnitude), mean)
    return image


_JITTER: tuple[Callable[[Tensor, float], Tensor], ...] = (
    v2.adjust_brightness,
    v2.adjust_contrast,
    v2.adjust_saturation,
)


def rand_augment(
    image: UInt8[Tensor, "3 h w"], operation: int, magnitude: float, mean: tuple[float, ...]
) -> UInt8[Tensor, "3 h w"]:
    """Applies one operation at a magnitude of -10 to 10; `mean` (0 to 1) fills pixels from outside the image."""
    level, fill = magnitude / 10, tuple(round(255 * value) for value in mean)
    strength, enhancement = abs(level), max(0.1, 1 + 0.9 * level)
    height, width = image.shape[1:]
    columns, rows = (np.arange(size) + 0.5 for size in (width, height))
    operations: tuple[Callable[[], Tensor], ...] = (
        lambda: _autocontrast(image),
        lambda: v2.equalize(image),
        lambda: v2.invert(image),
        lambda: _rotated(image, 30 * level, fill),
        lambda: v2.posterize(image, bits) if (bits := 4 - int(4 * strength)) else torch.zeros_like(image),
        lambda: _solarized(image, 256 - int(256 * strength)),
        lambda: torch.where(image < 128, image + int(110 * strength), image),
        lambda: _blended(_gray(image)[None], image, enhancement),
        lambda: _blended((_gray(image).double().mean() + 0.5).floor(), image, enhancement),
        lambda: _blended(torch.zeros_like(image), image, enhancement),
        lambda: _blended(_smoothed(image), image, enhancement),
        lambda: _rows_moved(image, 0.3 * level * rows, fill),
        lambda: _columns_moved(image, 0.3 * level * columns, fill),
        lambda: _rows_moved(image, np.full(height, 0.45 * level * width), fill),
        lambda: _columns_moved(image, np.full(width, 0.45 * level * height), fill),
    )
    return operations[operation]()


def _autocontrast(image: Tensor) -> Tensor:
    low, high = (bound.double() for bound in image.flatten(1).aminmax(dim=1))  # (3,)
    scale = torch.where(high > low, torch.full_like(low, 255) / (high - low), 1.0)  # `255 / x` multiplies by 1 / x
    offset = torch.where(high > low, -low * scale, 0.0)
    levels = torch.arange(256, dtype=torch.float64, device=image.device)
    table = (levels * scale[:, None] + offset[:, None]).clamp(0, 255).to(torch.uint8)  # (3, 256)
    return torch.stack([row[channel.int()] for row, channel in zip(table, image, strict=True)])


def _solarized(image: Tensor, threshold: int) -> Tensor:
    return image if threshold > 255 else torch.where(image < threshold, image, 255 - image)


def _gray(image: Tensor) -> Tensor:
    """PIL's conversion to mode L, (H, W), int32."""
    red, green, blue = image.int()
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _smoothed(image: Tensor) -> Tensor:
    """PIL's filter SMOOTH, float32: 3 x 3 with weight 5 in the centre; the outermost pixels are unchanged."""
    smooth = image.float()
    if min(image.shape[1:]) > 2:
        rows = smooth[:, :-2] + smooth[:, 1:-1] + smooth[:, 2:]
        box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
        smooth[:, 1:-1, 1:-1] = ((box + 4 * smooth[:, 1:-1, 1:-1]) / 13 + 0.5).floor()
    return smooth


def _blended(plain: Tensor, image: Tensor, factor: float) -> Tensor:
    """`plain` + factor * (image - plain) in float32, truncated and clipped as PIL's blend does."""
    plain = plain.float()
    return (image.float() - plain).mul_(factor).add_(plain).clamp_(0, 255).to(torch.uint8)


def _rotated(image: Tensor, degrees: float, fill: tuple[int, ...]) -> Tensor:
    """Rotated anticlockwise around the centre, bicubic."""
    if image.device.type == "cpu":  # the same levels in a fifth of the time
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        rotated = np.array(picture.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=fill))
        return torch.from_numpy(rotated).permute(2, 0, 1)
    return rotated_on_device(image, degrees, fill)


def rotated_on_device(image: UInt8[Tensor, "3 h w"], degrees: float, fill: tuple[int, ...]) -> UInt8[Tensor, "3 h w"]:
    """PIL's `Image.rotate` of degrees other than multiples of 90, bicubic, with tensor operations only."""
    height, width = image.shape[1:]
    cos, sin = (round(function(math.radians(degrees)), 15) for function in (math.cos, math.sin))
    column = torch.arange(width, dtype=torch.float64, device=image.device) + 0.5
    row = (torch.arange(height, dtype=torch.float64, device=image.device) + 0.5)[:, None]
    x = cos * column - sin * row + (cos * -(width / 2) - sin * -(height / 2) + width / 2)  # (H, W), in the source
    y = sin * column + cos * row + (sin * -(width / 2) + cos * -(height / 2) + height / 2)
    inside = (0 <= x) & (x < width) & (0 <= y) & (y < height)
    left, top = (x - 0.5).floor(), (y - 0.5).floor()
    across, along = (at - 0.5 - start for at, start in ((x, left), (y, top)))

    def taps(start: Tensor, size: int) -> list[Tensor]:
        return [(start.long() + step).clamp(0, size - 1) for step in (-1, 0, 1, 2)]

    columns, pixels = taps(left, width), image.double()
    lines = []
    for line in taps(top, height):
        values = [pixels[:, line, column] for column in columns]
        lines.append(values[1] + _bend(across, *values))
    return _filled(lines[1] + _bend(along, *lines), inside, fill)


def _columns_moved(image: Tensor, shifts: np.ndarray, fill: tuple[int, ...]) -> Tensor:
    return _rows_moved(image.transpose(1, 2), shifts, fill).transpose(1, 2)


def _rows_moved(image: Tensor, shifts: Float64[np.ndarray, "h"], fill: tuple[int, ...]) -> Tensor:
    """Each row moved to the left by its shift in pixels, bicubic."""
    _, height, width = image.shape
    whole = np.floor(shifts)
    columns = np.arange(-1, width + 2) + whole[:, None].astype(int)  # (H, W + 3): those that the four taps read
    source = np.arange(height)[:, None] * width + columns.clip(0, width - 1)
    centres = columns[:, 1:-2] + (shifts - whole)[:, None] + 0.5
    inside, index = (
        torch.from_numpy(values).to(image.device, non_blocking=True)
        for values in ((0 <= centres) & (centres < width), source.ravel().astype(np.int32))
    )
    across = torch.from_numpy((shifts - whole).astype(np.float32)).to(image.device, non_blocking=True)[:, None]
    pixels = image.permute(1, 2, 0).reshape(-1, 3)[index].float().view(height, -1)  # (H, (W + 3) * 3)
    first, second, third, fourth = (pixels[:, 3 * tap : 3 * (tap + width)] for tap in range(4))
    # `second` is whole, so this truncates the sum, in which float32 would lose the bend of a small shift.
    moved = second + _bend(across, first, second, third, fourth).floor_()
    return _filled(moved.view(height, width, 3).permute(2, 0, 1), inside, fill)


def _bend(at: Tensor, first: Tensor, second: Tensor, third: Tensor, fourth: Tensor) -> Tensor:
    """What PIL's cubic (a = -1) adds to the second value on the way to the third; exactly 0 in an even area."""
    square = 2 * (first - second) + third - fourth
    return at * (third - first + at * (square + at * (second - first + fourth - third)))


def _filled(values: Tensor, inside: Tensor, fill: tuple[int, ...]) -> Tensor:
    """Values as levels, truncated as PIL does, and `fill` where a pixel lies outside the image."""
    levels = values.clamp(0, 255).to(torch.uint8)
    for channel, level in zip(levels, fill, strict=True):
        channel.masked_fill_(~inside, level)
    return levels
