"""RandAugment on tensors gives the levels of timm, which calls PIL."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torch._subclasses.fake_tensor import FakeTensorMode

from maelstream.pipeline.pixel_augment import (
    OPERATIONS,
    PixelAugment,
    augment_pixels,
    rand_augment,
    rotated_on_device,
)
from tests.conftest import photograph

MEAN = (0.485, 0.456, 0.406)
FILL = tuple(round(255 * value) for value in MEAN)
MOVES = ("ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def tensor_of(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def pictures() -> list[Image.Image]:
    """A photograph; noise; one colour; few levels; all levels in one row; the smallest sizes."""
    random = np.random.default_rng(0)
    noise = [random.integers(0, 256, (*size, 3)) for size in ((37, 52), (1, 1), (2, 2), (1, 9), (9, 2), (3, 3))]
    even, few = np.full((20, 30, 3), 77), random.integers(100, 103, (30, 20, 3))
    levels = np.repeat(np.arange(256).reshape(1, 256, 1), 3, axis=2)
    arrays = [array.astype(np.uint8) for array in (*noise, even, few, levels)]
    return [photograph(64, 48), *map(Image.fromarray, arrays)]


PICTURES = pictures()


def magnitudes() -> np.ndarray:
    """The ends, 0, tiny ones, and the distribution of fine-tuning; both signs."""
    drawn = np.random.default_rng(1).normal(9, 0.5, 4).clip(0, 10)
    sizes = np.concatenate([[0, 1e-9, 1e-3, 0.039, 0.04, 0.5, 1, 2.5, 5, 7.5, 9.999, 10], drawn])
    return np.concatenate([sizes, -sizes])


def by_timm(picture: Image.Image, operation: int, magnitude: float, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """timm's operation with the interpolation and the fill of MAE's fine-tuning."""
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: math.copysign(1, magnitude) * value)
    name = auto_augment._RAND_INCREASING_TRANSFORMS[operation]
    level = auto_augment.LEVEL_TO_ARG[name]
    arguments = level(abs(magnitude), {}) if level is not None else ()
    if name == "PosterizeIncreasing" and arguments == (0,):  # black up to Pillow 11; a ValueError in later versions
        return torch.zeros_like(tensor_of(picture))
    keywords = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
    return tensor_of(auto_augment.NAME_TO_OP[name](picture, *arguments, **keywords))


def test_there_are_as_many_operations_as_in_timm() -> None:
    assert len(auto_augment._RAND_INCREASING_TRANSFORMS) == OPERATIONS


@pytest.mark.parametrize("operation", range(OPERATIONS))
def test_each_operation_equals_that_of_timm_at_every_magnitude(monkeypatch: pytest.MonkeyPatch, operation: int) -> None:
    """Equal; shear and translation, which interpolate in float32, by one level in 1 of 2,000 values."""
    name = auto_augment._RAND_INCREASING_TRANSFORMS[operation]
    differing = total = 0
    for picture in PICTURES:
        for magnitude in magnitudes().tolist():
            expected = by_timm(picture, operation, magnitude, monkeypatch)
            actual = rand_augment(tensor_of(picture), operation, magnitude, MEAN)
            assert actual.dtype == torch.uint8
            difference = (actual.int() - expected.int()).abs()
            assert difference.max() <= (name in MOVES), (name, magnitude, picture.size)
            if abs(magnitude) > 1e-6:  # below, 1 minus a shift in pixels is 1 in float32
                differing, total = differing + int((difference > 0).sum()), total + difference.numel()
    assert differing / total < 5e-4, name


@pytest.mark.parametrize("degrees", [0.0, 1e-7, 3.3, -17.25, 27.0, 30.0, -30.0])
def test_the_rotation_of_gpus_equals_that_of_cpus(degrees: float) -> None:
    for picture in PICTURES:
        rotated = rotated_on_device(tensor_of(picture), degrees, FILL)
        expected = tensor_of(picture.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=FILL))
        difference = (rotated.int() - expected.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("operation", range(OPERATIONS))
def test_each_operation_runs_on_a_gpu_and_never_waits_for_it(operation: int) -> None:
    """On fake tensors, a CPU tensor that meets a CUDA one raises, as does any value that the host would read."""
    with FakeTensorMode():
        image = torch.empty(40, 50, 3, dtype=torch.uint8, device="cuda").permute(2, 0, 1)
        augmented = rand_augment(image, operation, 7.7, MEAN)
    assert augmented.device.type == "cuda" and augmented.shape == (3, 40, 50) and augmented.dtype == torch.uint8


def test_two_operations_are_applied_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = photograph(64, 64)
    params = PixelAugment(None, None, np.array([[3, 2]]), np.array([[9.0, 9.0]]), None)
    rotated = Image.fromarray(by_timm(picture, 3, 9.0, monkeypatch).permute(1, 2, 0).numpy())
    assert torch.equal(augment_pixels(tensor_of(picture), params, 0, MEAN), by_timm(rotated, 2, 9.0, monkeypatch))


def test_parameters_that_apply_nothing_leave_the_image_unchanged() -> None:
    image = tensor_of(photograph(64, 64))
    nothing = PixelAugment(None, None, np.array([[-1, -1]]), np.zeros((1, 2)), None)
    assert torch.equal(augment_pixels(image, nothing, 0, MEAN), image)
    assert augment_pixels(image, None, 0, MEAN) is image
