"""Reconstruction targets for the removed patches: pixels, PCA coefficients, or tokens (paper, table 1d).

A target is a frozen module. Its tensors are non-persistent buffers, not parameters, so optimizer, weight decay and
checkpoints do not include them. They move with the model to another device, and stay float32 when the model is cast.
"""

from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from maelstream.model.config import Target
from maelstream.model.patches import denormalise, normalise, patchify, pixel_target, predicted_pixels
from maelstream.model.tokenizer import Decoder, Encoder, map_pixels, median_pixels, resize_to_grid


class PixelTarget(nn.Module):
    """Pixels of the normalised image, or pixels normalised within each patch."""

    def __init__(self, kind: Target) -> None:
        super().__init__()
        self.kind = kind

    def expected(self, images: Tensor, patches: Float[Tensor, "b n ppc"], indices: Tensor) -> Float[Tensor, "b n ppc"]:
        return pixel_target(patches, self.kind)

    def error(self, prediction: Tensor, expected: Tensor) -> Tensor:
        return F.mse_loss(prediction, expected)

    def pixels(self, prediction: Tensor, patches: Tensor) -> Tensor:
        return predicted_pixels(prediction, patches, self.kind)


class _Frozen(nn.Module):
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow moves to another device, but not casts."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


class PCATarget(_Frozen):
    """Coefficients of the largest principal components of patches of the normalised image.

    All coefficients are divided by one number, so that their mean variance is 1; they are not whitened. The components
    are orthonormal, so the error is proportional to the pixel error in the space that they span. Predicting the mean
    patch has error 1.
    """

    components: Float32[Tensor, "k ppc"]
    mean: Float32[Tensor, "ppc"]

    def __init__(
        self, components: Float[Tensor, "k ppc"], mean: Float[Tensor, "ppc"], variances: Float[Tensor, "k"]
    ) -> None:
        """`variances` are the variances along the components; only their mean is used."""
        super().__init__()
        self.scale = variances.mean().sqrt().item()
        self.register_buffer("components", components.float(), persistent=False)
        self.register_buffer("mean", mean.float(), persistent=False)

    @property
    def dim(self) -> int:
        return len(self.components)

    @torch.no_grad()
    def expected(self, images: Tensor, patches: Float[Tensor, "b n ppc"], indices: Tensor) -> Float[Tensor, "b n k"]:
        """Coefficients of `patches`, in their dtype, even under autocast."""
        with torch.autocast(patches.device.type, enabled=False):
            coefficients = (patches - self.mean.to(patches.dtype)) @ self.components.T.to(patches.dtype)  # (B, N, K)
            return coefficients / self.scale

    def error(self, prediction: Float[Tensor, "b n k"], expected: Float[Tensor, "b n k"]) -> Float[Tensor, ""]:
        """Mean squared error."""
        return F.mse_loss(prediction, expected)

    def pixels(self, prediction: Float[Tensor, "b l k"], patches: Tensor) -> Float[Tensor, "b l ppc"]:
        """Patches with these coefficients; the part of a patch outside the span of the components is lost."""
        coefficients = prediction * self.scale
        return coefficients @ self.components.to(prediction.dtype) + self.mean.to(prediction.dtype)  # (B, L, P*P*C)


class TokenTarget(_Frozen):
    """The tokenizer's code at the position of each patch, as in BEiT (Bao et al. 2021, arXiv 2106.08254).

    The tokenizer sees the whole image, resized on its device to 8 x 8 pixels per patch.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder | None,
        grid: tuple[int, int],
        patch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        """Convert the parameters of `encoder` and `decoder` into buffers, in place; only `pixels` needs a decoder."""
        super().__init__()
        self.encoder, self.decoder = _frozen(encoder), None if decoder is None else _frozen(decoder)
        self.grid, self.patch_size, self.mean, self.std = grid, patch_size, mean, std

    @property
    def dim(self) -> int:
        return self.encoder.config.codes

    @torch.no_grad()
    def expected(self, images: Float[Tensor, "b c h w"], patches: Tensor, indices: Int64[Tensor, "b n"]) -> Tensor:
        """Codes (B, N), int64. They are always computed in float32, for any dtype of `images` and under autocast."""
        with torch.autocast(images.device.type, enabled=False):
            levels = resize_to_grid(denormalise(images.float(), self.mean, self.std), self.grid)  # (B, C, 8*gh, 8*gw)
            codes = self.encoder(map_pixels(levels)).argmax(1).flatten(1)  # (B, L)
        return codes.gather(1, indices)

    def error(self, prediction: Float[Tensor, "b n codes"], expected: Int64[Tensor, "b n"]) -> Float[Tensor, ""]:
        """Cross-entropy in nats; a uniform guess has log(number of codes)."""
        return F.cross_entropy(prediction.flatten(0, 1), expected.flatten())

    def pixels(self, prediction: Float[Tensor, "b l codes"], patches: Tensor) -> Float[Tensor, "b l ppc"]:
        """The image that the tokenizer decodes from the most likely codes, as patches of the normalised image.

        Raises:
            ValueError: the tokenizer has no decoder.
        """
        if self.decoder is None:
            raise ValueError("the tokenizer has no decoder, so its tokens cannot be shown as pixels")
        one_hot = F.one_hot(prediction.argmax(2), self.dim).mT.unflatten(2, self.grid).float()  # (B, V, gh, gw)
        size = tuple(self.patch_size * side for side in self.grid)
        small = median_pixels(self.decoder(one_hot))  # (B, C, 8*gh, 8*gw)
        levels = F.interpolate(small, size, mode="bicubic", antialias=True).clamp(0, 1)  # (B, C, H, W)
        return patchify(normalise(255 * levels, self.mean, self.std), self.patch_size).to(prediction.dtype)


ReconstructionTarget = PixelTarget | PCATarget | TokenTarget


def _frozen(module: Any) -> Any:
    """`module` in evaluation mode, with buffers instead of parameters."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach().float(), persistent=False)
    return module.eval()
