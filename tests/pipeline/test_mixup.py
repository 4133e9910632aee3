"""Mixup and CutMix equal those of timm and depend only on the keys of the batch."""

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup
from torch import Tensor

from maelstream.pipeline.config import MixupConfig
from maelstream.pipeline.mixup import apply_mixup

LABELS = torch.tensor([0, 1, 2, 3, 4, 5])


def batch(size: int = 6) -> Tensor:
    return torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", [MixupConfig(), MixupConfig(cutmix=0.0), MixupConfig(mixup=0.0, cutmix=2.0)])
@pytest.mark.parametrize("key", [1, 2, 3, -5])
def test_images_and_targets_equal_those_of_timm(config: MixupConfig, key: int) -> None:
    images, targets = apply_mixup(batch(), LABELS, torch.tensor([key, 9, 9]), 10, config)
    np.random.seed(key & 0xFFFFFFFF)
    expected = Mixup(config.mixup, config.cutmix, num_classes=10, label_smoothing=0.1)(batch(), LABELS)
    assert torch.equal(images, expected[0]) and torch.equal(targets, expected[1])
    assert not torch.equal(images, batch())
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))


def test_equal_keys_give_equal_images_and_the_numpy_generator_is_restored() -> None:
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    first = apply_mixup(batch(), LABELS, torch.tensor([4]), 10, MixupConfig())
    assert np.random.rand() == expected
    again, other = (apply_mixup(batch(), LABELS, torch.tensor([key]), 10, MixupConfig()) for key in (4, 5))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and not torch.equal(first[0], other[0])


def test_the_middle_image_of_an_odd_batch_is_mixed_with_itself() -> None:
    images, targets = apply_mixup(batch(5), LABELS[:5], torch.tensor([1]), 10, MixupConfig(cutmix=0.0))
    torch.testing.assert_close(images[2], batch(5)[2])
    assert targets[2].argmax() == 2 and targets[2].max() == pytest.approx(0.91)


def test_without_mixup_and_cutmix_images_are_unchanged() -> None:
    images, targets = apply_mixup(batch(), LABELS, torch.tensor([1]), 10, MixupConfig(0.0, 0.0, 0.0))
    assert torch.equal(images, batch()) and torch.equal(targets, torch.nn.functional.one_hot(LABELS, 10).float())


def test_invalid_settings_are_rejected() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        MixupConfig(mixup=-1)
