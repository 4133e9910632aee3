"""RandAugment and erasing on tensors give the results of timm."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from maelstream.pipeline.pixel_augment import OPERATIONS, PixelAugment, augment_pixels, rand_augment
from tests.conftest import photograph

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = tuple(round(255 * value) for value in MEAN)


def tensor_of(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def test_there_are_as_many_operations_as_in_timm() -> None:
    assert len(auto_augment._RAND_INCREASING_TRANSFORMS) == OPERATIONS


@pytest.mark.parametrize("magnitude", [-9.0, 3.0, 9.0])
@pytest.mark.parametrize("operation", range(OPERATIONS))
def test_each_operation_equals_that_of_timm(monkeypatch: pytest.MonkeyPatch, operation: int, magnitude: float) -> None:
    picture = photograph(96, 96)
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: value if magnitude > 0 else -value)
    name = auto_augment._RAND_INCREASING_TRANSFORMS[operation]
    level = auto_augment.LEVEL_TO_ARG[name]
    arguments = level(abs(magnitude), {}) if level is not None else ()
    expected = auto_augment.NAME_TO_OP[name](picture, *arguments, fillcolor=FILL, resample=Image.Resampling.BILINEAR)
    actual = rand_augment(tensor_of(picture), operation, magnitude, MEAN)
    difference = (actual.int() - tensor_of(expected).int()).abs().float()
    # Interpolation rounds differently, and a pixel at an edge may be filled or not.
    assert difference.mean() < 2.5 and (difference > 8).float().mean() < 0.03, name


def params_of(**parts: object) -> PixelAugment:
    none = dict.fromkeys(("jitter_factors", "jitter_orders", "operations", "magnitudes", "boxes"))
    return PixelAugment(**(none | {"noise_keys": np.array([5])} | parts))


def test_an_erased_box_holds_normal_noise_and_the_rest_is_unchanged() -> None:
    image = tensor_of(photograph(224, 224))
    box = params_of(boxes=np.array([[20, 30, 150, 120]], np.int32))
    erased = augment_pixels(image, box, 0, MEAN, STD)
    inside = erased[:, 30:150, 20:170].float() / 255
    for channel, mean, std in zip(inside, MEAN, STD, strict=True):
        assert abs(float(channel.mean()) - mean) < 0.02 and abs(float(channel.std()) - std) < 0.02
    untouched = erased.clone()
    untouched[:, 30:150, 20:170] = image[:, 30:150, 20:170]
    assert torch.equal(untouched, image)
    assert torch.equal(erased, augment_pixels(image, box, 0, MEAN, STD))


def test_parameters_that_apply_nothing_leave_the_image_unchanged() -> None:
    image = tensor_of(photograph(64, 64))
    nothing = params_of(operations=np.array([[-1, -1]]), magnitudes=np.zeros((1, 2)), boxes=np.zeros((1, 4), np.int32))
    assert torch.equal(augment_pixels(image, nothing, 0, MEAN, STD), image)
    assert augment_pixels(image, None, 0, MEAN, STD) is image
