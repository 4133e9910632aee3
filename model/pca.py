"""Principal components of the patches of many images, in one pass and O(D^2) memory.

What is summed up are the patches' levels, 0..255, and their products: integers, which float64 holds exactly. So the
sums are the same to the last bit in whatever order, batches, threads or devices they are taken; the normalisation of
the images is an affine map that is applied to the sums at the end.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

_EXACT = 2**53  # integers below it are float64s


class PatchMoments:
    """Sums of patches and of their products."""

    count: int
    total: Float64[Tensor, "d"]
    products: Float64[Tensor, "d d"]

    def __init__(self, patch_dim: int, device: torch.device) -> None:
        self.count = 0
        self.total = torch.zeros(patch_dim, dtype=torch.float64, device=device)
        self.products = torch.zeros(patch_dim, patch_dim, dtype=torch.float64, device=device)

    def add(self, patches: UInt8[Tensor, "b l d"]) -> None:
        """Takes in patches of `patchify`, on the moments' device.

        Raises:
            ValueError: more patches than can be summed up exactly (1.4e11).
        """
        levels = patches.flatten(0, 1).double()  # (N, D)
        self.count += len(levels)
        if self.count * 255**2 >= _EXACT:
            raise ValueError(f"{self.count} patches are more than can be summed up exactly; take fewer images")
        self.total += levels.sum(0)
        self.products += levels.T @ levels


class PrincipalComponents(NamedTuple):
    """Of patches of normalised images."""

    components: Float64[Tensor, "k d"]
    """Orthonormal rows, largest variance first; the entry of largest magnitude of each is positive."""
    mean: Float64[Tensor, "d"]
    variances: Float64[Tensor, "d"]
    """Along all components, those that are left out too: the eigenvalues of the unbiased covariance, descending."""


def principal_components(
    moments: PatchMoments, count: int, mean: Sequence[float], std: Sequence[float]
) -> PrincipalComponents:
    """The `count` largest components; `mean` and `std` are those that the images are normalised by, one a channel.

    Raises:
        ValueError: no more patches than components, or none that differs from the others.
    """
    if moments.count <= max(count, 1):
        raise ValueError(f"{moments.count} patches are too few for {count} components; take more images")
    pixels = len(moments.total) // len(mean)
    shift, scale = (torch.tensor(values, dtype=torch.float64).repeat(pixels) for values in (mean, std))  # (D,)
    total, products = moments.total.cpu(), moments.products.cpu()
    covariance = (products - total.outer(total) / moments.count) / (moments.count - 1)  # (D, D), of levels
    if not covariance.diagonal().any():
        raise ValueError("all patches are alike; take more varied images")
    variances, vectors = torch.linalg.eigh(covariance / (255 * scale).outer(255 * scale))  # ascending
    components = vectors.T.flip(0)[:count]  # (K, D)
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))  # (K, 1)
    return PrincipalComponents(
        components=components * largest.sign(),
        mean=(total / moments.count / 255 - shift) / scale,
        variances=variances.flip(0).clamp(min=0),
    )
