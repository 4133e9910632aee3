"""Principal components: equal to sklearn on the same patches, and bit-identical for any order of summation."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from maelstream.model.patches import normalise, patchify
from maelstream.model.pca import PatchMoments, principal_components

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Smooth images, so that variances of components differ, with some noise, so that none is zero."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(24, 3, 6, 6, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (32, 48), mode="bicubic") + 0.02 * torch.randn(24, 3, 32, 48)
    return (fine.clamp(0, 1) * 255).to(torch.uint8)


def moments_of(images: torch.Tensor, batch: int) -> PatchMoments:
    moments = PatchMoments(8 * 8 * 3, torch.device("cpu"))
    for part in images.split(batch):
        moments.add(patchify(part, 8))
    return moments


def test_components_mean_and_variances_equal_sklearn(images: torch.Tensor) -> None:
    """sklearn decomposes the normalised patches themselves; its rule for signs is the same."""
    found = principal_components(moments_of(images, 5), 20, MEAN, STD)
    patches = patchify(normalise(images, MEAN, STD).double(), 8).flatten(0, 1).numpy()
    reference = PCA(20, svd_solver="full").fit(patches)
    assert np.abs(found.components.numpy() - reference.components_).max() < 1e-5
    assert np.abs(found.mean.numpy() - reference.mean_).max() < 1e-6
    np.testing.assert_allclose(found.variances[:20], reference.explained_variance_, rtol=1e-6)
    np.testing.assert_allclose((found.variances / found.variances.sum())[:20], reference.explained_variance_ratio_)


def test_the_sums_are_bit_identical_for_any_batch_size_and_order(images: torch.Tensor) -> None:
    one, other = moments_of(images, 24), moments_of(images.flip(0), 7)
    assert one.count == other.count == 24 * 24
    assert torch.equal(one.total, other.total) and torch.equal(one.products, other.products)
    levels = patchify(images, 8).flatten(0, 1).long()
    assert torch.equal(one.products.long(), levels.T @ levels)  # exact integers


def test_components_are_orthonormal_and_the_largest_entry_is_positive(images: torch.Tensor) -> None:
    components = principal_components(moments_of(images, 24), 192, MEAN, STD).components
    assert torch.allclose(components @ components.T, torch.eye(192, dtype=torch.float64), atol=1e-10)
    assert (components.amax(1) == components.abs().amax(1)).all()


def test_patches_without_components_raise(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="all patches are equal"):
        principal_components(moments_of(torch.full_like(images, 7), 24), 20, MEAN, STD)
    with pytest.raises(ValueError, match="24 patches are too few for 30 components"):
        principal_components(moments_of(images[:1], 1), 30, MEAN, STD)
    moments = moments_of(images[:1], 1)
    moments.count = 2**53 // 255**2
    with pytest.raises(ValueError, match="more than can be summed exactly"):
        moments.add(patchify(images[:1], 8))
