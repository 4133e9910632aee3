"""Erasing as timm does it: unclipped normal noise in boxes of normalised images, a pure function of the key."""

import random

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.random_erasing import RandomErasing
from torch._subclasses.fake_tensor import FakeTensorMode

from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.config import CropConfig, LoaderConfig
from maelstream.pipeline.erase import Erasing, erase
from maelstream.pipeline.hashing import mix_bits
from maelstream.pipeline.loader import ImageLoader
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.output import Output
from maelstream.pipeline.producer import Batch
from maelstream.shards.dataset import Dataset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BOXES = Erasing(np.array([[4, 6, 50, 40], [0, 0, 0, 0], [10, 0, 20, 64], [63, 63, 1, 1]], np.int32), np.arange(4) - 2)


def erased(erasing: Erasing, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    images = torch.full((len(erasing.keys), 3, 64, 64), 9, dtype=dtype)
    erase(images, erasing, MEAN, STD)
    return images


def test_each_box_is_filled_and_nothing_else() -> None:
    for image, (left, top, width, height) in zip(erased(BOXES), BOXES.boxes.tolist(), strict=True):
        changed = (image != 9).all(0)
        assert int(changed.sum()) == width * height == int(changed[top : top + height, left : left + width].sum())


def test_the_noise_is_normal_and_independent_like_that_of_timm() -> None:
    """Kolmogorov and Smirnov against the normal distribution and against timm's own noise; lag correlations."""
    box = np.tile(np.array([[0, 0, 64, 64]], np.int32), (20, 1))
    noise = erased(Erasing(box, np.arange(20) * 7919))
    random.seed(0)
    torch.manual_seed(0)
    timms = torch.full((20, 3, 200, 200), 9.0)
    RandomErasing(probability=1, mode="pixel", device="cpu")(timms)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-4
    assert stats.ks_2samp(noise.flatten().numpy(), timms[timms != 9].numpy()).pvalue > 1e-4
    for left, right in ((noise[:-1], noise[1:]), (noise[:, 0], noise[:, 1]), (noise[..., 1:], noise[..., :-1])):
        assert abs(float((left * right).mean())) < 6 / left.numel() ** 0.5
    # Levels of 0 and 255 normalise to -2.1 and 2.2: bytes cannot hold the ends.
    assert float(noise.abs().max()) > 4


def test_the_noise_of_an_image_does_not_depend_on_its_batch_or_its_memory_format() -> None:
    together = erased(BOXES)
    for index in range(4):
        assert torch.equal(erased(BOXES.of(index))[0], together[index])
    images = torch.full((4, 3, 64, 64), 9.0).contiguous(memory_format=torch.channels_last)
    erase(images, BOXES, MEAN, STD)
    assert torch.equal(images, together)


def test_the_noise_is_box_and_mullers_on_the_hash_of_the_data_path() -> None:
    index = np.arange(3 * 64 * 64, dtype=np.uint64).reshape(3, 64, 64)[:, 6:46, 4:54]
    key, gamma = np.array([-2]).view(np.uint64), np.uint64(0x9E3779B97F4A7C15)
    bits = mix_bits(key + (index + np.uint64(1)) * gamma)
    radius = np.sqrt(-2 * np.log(((bits >> np.uint64(32)) + 0.5) / 2**32))
    expected = radius * np.cos(2 * np.pi * (bits & np.uint64(0xFFFFFFFF)) / 2**32)
    assert np.abs(erased(BOXES)[0, :, 6:46, 4:54].numpy() - expected).max() < 1e-5
    # If this number changes, old runs resume with other noise.
    assert expected[0, 0, 0] == pytest.approx(0.1743192, abs=1e-6)


def test_bytes_get_rounded_and_clipped_noise() -> None:
    noise, levels = erased(BOXES), erased(BOXES, torch.uint8)
    inside = levels != 9
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    expected = (255 * (noise * std + mean)).clamp(0, 255)
    assert (levels.float() - expected).abs()[inside].max() <= 0.5001
    assert int((levels == 0).sum()) > 10 and int((levels == 255).sum()) > 10


def test_erasing_runs_on_a_gpu_and_never_waits_for_it() -> None:
    with FakeTensorMode():
        images = torch.empty(4, 3, 64, 64, device="cuda")
        erase(images, BOXES, MEAN, STD)
    assert images.device.type == "cuda"


def batches(dataset: Dataset, output: Output, ranks: int = 1) -> list[Batch]:
    """The first global batch of 12, by rank."""
    found = []
    for rank in range(ranks):
        sampler = AugmentSampler(5, CropConfig(erase=0.6), (64, 64))
        split, order = BatchSplit(12, ranks, 1), SampleOrder(len(dataset), 5)
        with ImageLoader(dataset, order, sampler, split, rank, LoaderConfig(threads=1), output) as loader:
            found.append(next(iter(loader)))
    return found


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def test_bytes_erased_after_normalising_equal_the_loaders_float_output_on_any_number_of_ranks(packed: Dataset) -> None:
    (floats,) = batches(packed, Output("float32"))
    assert floats.erasing is None and float(floats.images.max()) > 2.7  # beyond white
    for ranks in (1, 3):
        parts = []
        for batch in batches(packed, Output(erase=False), ranks):
            assert batch.erasing is not None and batch.images.dtype == torch.uint8
            parts.append(normalised(batch.images))
            erase(parts[-1], batch.erasing, MEAN, STD)
        torch.testing.assert_close(torch.cat(parts), floats.images.contiguous(), rtol=0, atol=1e-5)
    (clipped,) = batches(packed, Output())
    assert clipped.erasing is None and not torch.equal(clipped.images, batches(packed, Output(erase=False))[0].images)
