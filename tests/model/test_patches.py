"""Patches: order, inverse and statistics."""

import pytest
import torch

from maelstream.model.config import Target
from maelstream.model.patches import (
    denormalise,
    normalise,
    patch_statistics,
    patchify,
    pixel_target,
    predicted_pixels,
    unpatchify,
)


def test_a_patch_has_the_order_row_column_channel() -> None:
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    row, column = 1, 2  # patch 5 of a 2 x 3 grid
    expected = images[1, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].permute(1, 2, 0).flatten()
    assert torch.equal(patches[1, row * 3 + column], expected)


@pytest.mark.parametrize(("channels", "height", "width", "size"), [(3, 32, 32, 4), (1, 48, 16, 8), (5, 14, 42, 14)])
def test_unpatchify_undoes_patchify(channels: int, height: int, width: int, size: int) -> None:
    images = torch.rand(2, channels, height, width)
    assert torch.equal(unpatchify(patchify(images, size), size, (height // size, width // size)), images)


def test_normalise_is_float32_and_denormalise_undoes_it() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 2, 16, 16)
    mean, std = (0.1, 0.5), (0.2, 0.9)
    normalised = normalise(images, mean, std)
    expected = (images.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert normalised.dtype == torch.float32
    assert (normalised - expected).abs().max() < 1e-6
    assert (denormalise(normalised, mean, std) - images / 255).abs().max() < 1e-6


def test_the_number_of_means_must_equal_the_number_of_channels() -> None:
    with pytest.raises(ValueError):
        normalise(torch.zeros(1, 2, 4, 4, dtype=torch.uint8), (0.5, 0.5), (0.5,))


def test_the_variance_is_unbiased_and_over_pixels_and_channels() -> None:
    patches = torch.tensor([[[1.0, 2.0, 3.0, 6.0]]])
    mean, deviation = patch_statistics(patches)
    assert mean.item() == 3
    assert deviation.item() == pytest.approx((14 / 3 + 1e-6) ** 0.5)


def test_a_flat_patch_has_a_finite_target() -> None:
    assert not pixel_target(torch.full((1, 2, 12), 0.7), "normalised_pixel").abs().max() > 1e-3


@pytest.mark.parametrize("target", ["pixel", "normalised_pixel"])
def test_a_perfect_prediction_returns_the_original_pixels(target: Target) -> None:
    patches = torch.randn(2, 5, 48)
    assert torch.allclose(predicted_pixels(pixel_target(patches, target), patches, target), patches, atol=1e-5)
