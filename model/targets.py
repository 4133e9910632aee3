"""What the decoder has to predict of the removed patches: pixels, PCA coefficients, or tokens (paper, table 1d).

A target is a frozen module. What it holds are buffers that no state_dict knows, not parameters: optimizer, weight decay
and checkpoints see nothing of it, it follows the model to another device, and it stays float32 when the model is cast.
"""

from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from maelstream.model.config import Target
from maelstream.model.patches import denormalise, normalise, patchify, pixels_of, target_of
from maelstream.model.tokenizer import Decoder, Encoder, fitted, likeliest_pixels, map_pixels


class PixelTarget(nn.Module):
    """The pixels of the normalised image, or of each patch normalised by itself."""

    def __init__(self, kind: Target) -> None:
        super().__init__()
        self.kind = kind

    def of(self, images: Tensor, patches: Float[Tensor, "b n ppc"], numbers: Tensor) -> Float[Tensor, "b n ppc"]:
        return target_of(patches, self.kind)

    def error(self, prediction: Tensor, expected: Tensor) -> Tensor:
        return F.mse_loss(prediction, expected)

    def pixels(self, prediction: Tensor, patches: Tensor) -> Tensor:
        return pixels_of(prediction, patches, self.kind)


class _Frozen(nn.Module):
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow a move to another device, and no cast."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


class PCATarget(_Frozen):
    """Coefficients of the largest principal components of the normalised image's patches.

    They are not whitened but divided by one number, so that their mean variance is 1: the components are orthonormal,
    so the error stays the pixels' in the space that these span, and predicting the mean patch costs 1.
    """

    components: Float32[Tensor, "k ppc"]
    mean: Float32[Tensor, "ppc"]

    def __init__(
        self, components: Float[Tensor, "k ppc"], mean: Float[Tensor, "ppc"], variances: Float[Tensor, "k"]
    ) -> None:
        """`variances` are those along the components, of which only the mean counts."""
        super().__init__()
        self.scale = variances.mean().sqrt().item()
        self.register_buffer("components", components.float(), persistent=False)
        self.register_buffer("mean", mean.float(), persistent=False)

    @property
    def dim(self) -> int:
        return len(self.components)

    @torch.no_grad()
    def of(self, images: Tensor, patches: Float[Tensor, "b n ppc"], numbers: Tensor) -> Float[Tensor, "b n k"]:
        """Coefficients of `patches`, in their dtype, under autocast too."""
        with torch.autocast(patches.device.type, enabled=False):
            coefficients = (patches - self.mean.to(patches.dtype)) @ self.components.T.to(patches.dtype)  # (B, N, K)
            return coefficients / self.scale

    def error(self, prediction: Float[Tensor, "b n k"], expected: Float[Tensor, "b n k"]) -> Float[Tensor, ""]:
        """Mean squared error."""
        return F.mse_loss(prediction, expected)

    def pixels(self, prediction: Float[Tensor, "b l k"], patches: Tensor) -> Float[Tensor, "b l ppc"]:
        """What the coefficients stand for; of a patch, what lies outside the components is lost."""
        coefficients = prediction * self.scale
        return coefficients @ self.components.to(prediction.dtype) + self.mean.to(prediction.dtype)  # (B, L, P*P*C)


class TokenTarget(_Frozen):
    """The code that a tokenizer gives to the place of each patch, after BEiT (Bao et al. 2021, arXiv 2106.08254).

    The tokenizer sees the whole image, resized on its device to 8 x 8 pixels a patch.
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
        """Takes encoder and decoder over: their parameters become buffers. Without a decoder nothing can be shown."""
        super().__init__()
        self.encoder, self.decoder = _frozen(encoder), None if decoder is None else _frozen(decoder)
        self.grid, self.patch_size, self.mean, self.std = grid, patch_size, mean, std

    @property
    def dim(self) -> int:
        return self.encoder.config.codes

    @torch.no_grad()
    def of(self, images: Float[Tensor, "b c h w"], patches: Tensor, numbers: Int64[Tensor, "b n"]) -> Tensor:
        """Codes (B, N), int64, computed in float32 whatever the dtype of `images` is, under autocast too."""
        with torch.autocast(images.device.type, enabled=False):
            levels = fitted(denormalise(images.float(), self.mean, self.std), self.grid)  # (B, C, 8*gh, 8*gw)
            codes = self.encoder(map_pixels(levels)).argmax(1).flatten(1)  # (B, L)
        return codes.gather(1, numbers)

    def error(self, prediction: Float[Tensor, "b n codes"], expected: Int64[Tensor, "b n"]) -> Float[Tensor, ""]:
        """Cross-entropy in nats; log(number of codes) for a guess."""
        return F.cross_entropy(prediction.flatten(0, 1), expected.flatten())

    def pixels(self, prediction: Float[Tensor, "b l codes"], patches: Tensor) -> Float[Tensor, "b l ppc"]:
        """The image that the tokenizer's decoder makes of the likeliest codes, as patches of the normalised image.

        Raises:
            ValueError: the tokenizer came without its decoder.
        """
        if self.decoder is None:
            raise ValueError("the tokenizer has no decoder, so its tokens cannot be shown as pixels")
        one_hot = F.one_hot(prediction.argmax(2), self.dim).mT.unflatten(2, self.grid).float()  # (B, V, gh, gw)
        size = tuple(self.patch_size * side for side in self.grid)
        small = likeliest_pixels(self.decoder(one_hot))  # (B, C, 8*gh, 8*gw)
        levels = F.interpolate(small, size, mode="bicubic", antialias=True).clamp(0, 1)  # (B, C, H, W)
        return patchify(normalise(255 * levels, self.mean, self.std), self.patch_size).to(prediction.dtype)


ReconstructionTarget = PixelTarget | PCATarget | TokenTarget


def _frozen(module: Any) -> Any:
    """`module` with buffers in place of its parameters."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach().float(), persistent=False)
    return module.eval()
