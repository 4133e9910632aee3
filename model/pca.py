"""Principal components of the patches of many images, in one pass and O(D^2) memory.

The sums are over pixel values, 0..255, and their products: integers, which float64 holds exactly. So the sums are
bit-identical for any order, batch size, number of threads or device. The normalisation of the images is an affine map,
which is applied to the sums at the end.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

_EXACT = 2**53  # float64 holds all smaller integers exactly


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
        """Add patches from `patchify`, which are on the device of the sums.

        Raises:
            ValueError: there are more patches than can be summed exactly (1.4e11).
        """
        levels = patches.flatten(0, 1).double()  # (N, D)
        self.count += len(levels)
        if self.count * 255**2 >= _EXACT:
            raise ValueError(f"{self.count} patches are more than can be summed exactly; use fewer images")
        self.total += levels.sum(0)
        self.products += levels.T @ levels


class PrincipalComponents(NamedTuple):
    """Principal components of patches of normalised images."""

    components: Float64[Tensor, "k d"]
    """Orthonormal rows, largest variance first; the largest entry by magnitude of each row is positive."""
    mean: Float64[Tensor, "d"]
    variances: Float64[Tensor, "d"]
    """Variances along all D components, also those left out: descending eigenvalues of the unbiased covariance."""


def principal_components(
    moments: PatchMoments, count: int, mean: Sequence[float], std: Sequence[float]
) -> PrincipalComponents:
    """The `count` largest components of images normalised by `mean` and `std` (one value per channel).

    Raises:
        ValueError: there are no more patches than components, or all patches are equal.
    """
    if moments.count <= max(count, 1):
        raise ValueError(f"{moments.count} patches are too few for {count} components; use more images")
    pixels = len(moments.total) // len(mean)
    shift, scale = (torch.tensor(values, dtype=torch.float64).repeat(pixels) for values in (mean, std))  # (D,)
    total, products = moments.total.cpu(), moments.products.cpu()
    covariance = (products - total.outer(total) / moments.count) / (moments.count - 1)  # (D, D), of pixel values
    if not covariance.diagonal().any():
        raise ValueError("all patches are equal; use more varied images")
    variances, vectors = torch.linalg.eigh(covariance / (255 * scale).outer(255 * scale))  # ascending
    components = vectors.T.flip(0)[:count]  # (K, D)
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))  # (K, 1)
    return PrincipalComponents(
        components=components * largest.sign(),
        mean=(total / moments.count / 255 - shift) / scale,
        variances=variances.flip(0).clamp(min=0),
    )
