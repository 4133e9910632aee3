"""Random erasing (arXiv 1708.04896) as timm does it: normal noise in a box of some images, after normalisation.

The noise is a hash of (key, channel, row, column), so it is a pure function of (seed, epoch, sample): the CPU and the
GPU draw the same numbers up to float32's rounding. The hash is SplitMix64's finaliser (`pipeline/hashing.py`) in int64
arithmetic, which wraps as uint64 does.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64, Shaped
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_FACTOR_1, _FACTOR_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


@dataclass(frozen=True)
class Erasing:
    """The boxes of one batch."""

    boxes: Int32[np.ndarray, "b 4"]  # left, top, width, height in pixels; width 0: none
    keys: Int64[np.ndarray, "b"]

    def of(self, index: int) -> "Erasing":
        """That of one image alone."""
        return Erasing(self.boxes[index : index + 1], self.keys[index : index + 1])


def erase(images: Shaped[Tensor, "b 3 h w"], erasing: Erasing, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Writes noise into the boxes, in place: normal numbers into normalised images, as timm does.

    Bytes get the levels that `mean` and `std` (0 to 1) normalise to those numbers, but rounded and clipped to 0..255.
    """
    rows = np.flatnonzero(erasing.boxes[:, 2])
    if not rows.size:
        return
    device, (height, width) = images.device, images.shape[2:]
    starts = erasing.boxes[rows, :2].astype(np.int64)
    ends = starts + erasing.boxes[rows, 2:]
    (left, top), (right, bottom) = starts.min(0).tolist(), ends.max(0).tolist()  # of the smallest box around all
    corners = torch.from_numpy(np.stack([starts, ends])).to(device, non_blocking=True)[..., None]  # (2, N, 2, 1)
    columns, lines = torch.arange(left, right, device=device), torch.arange(top, bottom, device=device)
    beside = (columns >= corners[0, :, 0]) & (columns < corners[1, :, 0])  # (N, w)
    between = (lines >= corners[0, :, 1]) & (lines < corners[1, :, 1])  # (N, h)
    keys = torch.from_numpy(erasing.keys[rows]).to(device, non_blocking=True)
    pixels = lines[:, None] * width + columns
    noise = _normal(keys, torch.stack([pixels + channel * height * width for channel in range(3)]))  # (N, 3, h, w)
    if images.dtype == torch.uint8:
        levels = [
            (255 * (noise[:, c] * s + m)).clamp(0, 255).round() for c, (m, s) in enumerate(zip(mean, std, strict=True))
        ]
        noise = torch.stack(levels, dim=1)
    chosen = torch.from_numpy(rows).to(device, non_blocking=True)
    window = images[:, :, top:bottom, left:right]
    inside = (between[:, :, None] & beside[:, None])[:, None]  # (N, 1, h, w)
    window[chosen] = torch.where(inside, noise.to(images.dtype), window[chosen])


def _normal(keys: Int64[Tensor, "n"], indices: Int64[Tensor, "3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """A standard normal number for each key and index, by Box and Muller."""
    values = keys[:, None, None, None] + (indices + 1) * _GAMMA
    values = (values ^ _shifted(values, 30)) * _FACTOR_1
    values = (values ^ _shifted(values, 27)) * _FACTOR_2
    values = values ^ _shifted(values, 31)
    radius = (_shifted(values, 32).float() + 0.5).mul_(2.0**-32).log_().mul_(-2).clamp_(min=0).sqrt_()
    return (values & 0xFFFFFFFF).float().mul_(2 * math.pi * 2.0**-32).cos_().mul_(radius)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """A right shift that fills with zeros, as of unsigned numbers."""
    return values >> bits & (1 << 64 - bits) - 1
