"""Images as sequences of patches, and the pixel targets of the decoder (paper, section 3, "Reconstruction target").

A patch is a vector of pixels in the order (row, column, channel), channel fastest. The prediction head of the published
checkpoints uses the same order.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Shaped, UInt8
from torch import Tensor

from maelstream.model.config import Target

_EPS = 1e-6


def normalise(
    images: UInt8[Tensor, "b c h w"], mean: Sequence[float], std: Sequence[float]
) -> Float32[Tensor, "b c h w"]:
    """Scale pixels to 0..1, subtract `mean` and divide by `std` (one value per channel), in float32."""
    # Python numbers are kernel arguments. A buffer would be cast to bf16 with the module (by DeepSpeed), and a tensor
    # made here would be copied to the device at every step.
    channels = [(images[:, c].float() / 255 - m) / s for c, (m, s) in enumerate(zip(mean, std, strict=True))]
    return torch.stack(channels, dim=1)  # (B, C, H, W)


def denormalise(
    images: Float[Tensor, "b c h w"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "b c h w"]:
    """Inverse of `normalise`, clamped to 0..1 for display."""
    channels = [images[:, c] * s + m for c, (m, s) in enumerate(zip(mean, std, strict=True))]
    return torch.stack(channels, dim=1).clamp(0, 1)  # (B, C, H, W)


def patchify(images: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, "b l ppc"]:
    """Cut images into patches of `size` x `size` pixels in row-major order; H and W are multiples of `size`."""
    b, c, h, w = images.shape
    cells = images.reshape(b, c, h // size, size, w // size, size)  # (B, C, gh, p, gw, p)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, size * size * c)  # (B, L, P*P*C)


def unpatchify(patches: Shaped[Tensor, "b l ppc"], size: int, grid: tuple[int, int]) -> Shaped[Tensor, "b c h w"]:
    """Inverse of `patchify` for `grid` (rows, columns) of patches."""
    b, (gh, gw) = len(patches), grid
    cells = patches.reshape(b, gh, gw, size, size, -1)  # (B, gh, gw, p, p, C)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, gh * size, gw * size)  # (B, C, H, W)


class PatchStatistics(NamedTuple):
    """Mean and standard deviation of each patch, over all its pixels and channels."""

    mean: Float[Tensor, "b l 1"]
    deviation: Float[Tensor, "b l 1"]


def patch_statistics(patches: Float[Tensor, "b l ppc"]) -> PatchStatistics:
    """Mean and sqrt(variance + 1e-6) of each patch; the variance is unbiased, as in training the published models."""
    variance, mean = torch.var_mean(patches, dim=2, correction=1, keepdim=True)  # (B, L, 1)
    return PatchStatistics(mean, (variance + _EPS).sqrt())


def _normalised_pixel(patches: Tensor) -> Tensor:
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation


_TARGETS: dict[Target, Callable[[Tensor], Tensor]] = {
    "pixel": lambda patches: patches,
    "normalised_pixel": _normalised_pixel,
}


def pixel_target(patches: Float[Tensor, "b l ppc"], target: Target) -> Float[Tensor, "b l ppc"]:
    """The pixel target of `patches` of a normalised image, in their dtype."""
    return _TARGETS[target](patches)


def predicted_pixels(
    prediction: Float[Tensor, "b l ppc"], patches: Float[Tensor, "b l ppc"], target: Target
) -> Float[Tensor, "b l ppc"]:
    """Predictions as pixels of the normalised image.

    A model with the normalised target does not predict the brightness and contrast of a patch. Its predictions get the
    mean and standard deviation of the original `patches`; without them they look like noise.
    """
    if target == "pixel":
        return prediction
    mean, deviation = patch_statistics(patches)
    return prediction * deviation + mean
