"""AugmentSampler: torchvision's crop windows, from numbers that depend only on (seed, epoch, sample)."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import _compute_resized_output_size

from maelstream.pipeline.augment_params import (
    AugmentSampler,
    one_draw_crop,
    random_resized_crop,
    resized_crop,
)
from maelstream.pipeline.config import CropConfig, evaluation_margin

CROP = CropConfig()
sides = st.integers(1, 5000)


def scalar_window(numbers: Sequence[Sequence[float]], width: int, height: int) -> tuple[int, int, int, int]:
    """torchvision's documented algorithm, with scalars."""
    for area_number, ratio_number, left_number, top_number in numbers:
        area = width * height * (CROP.scale[0] + area_number * (CROP.scale[1] - CROP.scale[0]))
        low, high = (math.log(ratio) for ratio in CROP.ratio)
        ratio = math.exp(low + ratio_number * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(left_number * (width - w + 1)), int(top_number * (height - h + 1)), w, h
    w, h = width, height
    if width / height < CROP.ratio[0]:
        h = max(1, round(width / CROP.ratio[0]))
    elif width / height > CROP.ratio[1]:
        w = max(1, round(height * CROP.ratio[1]))
    return (width - w) // 2, (height - h) // 2, w, h


@given(width=sides, height=sides, seed=st.integers(0, 2**32 - 1))
def test_windows_come_from_ten_tries_or_else_from_the_centre(width: int, height: int, seed: int) -> None:
    numbers = np.random.default_rng(seed).random((1, 10, 4))
    window = random_resized_crop(numbers, np.array([width]), np.array([height]), CROP)
    assert tuple(window[0].tolist()) == scalar_window(numbers[0].tolist(), width, height)


@given(width=sides, height=sides, epoch=st.integers(0, 1000), sample=st.integers(0, 10**9))
def test_every_window_is_inside_its_image(width: int, height: int, epoch: int, sample: int) -> None:
    params = AugmentSampler(0, CROP, (224, 224)).at(
        np.array([epoch]), np.array([sample]), np.array([width], np.uint32), np.array([height], np.uint32)
    )
    left, top, w, h = params.windows[0].tolist()
    assert left >= 0 and top >= 0 and w >= 1 and h >= 1 and left + w <= width and top + h <= height


@pytest.mark.parametrize(("width", "height"), [(500, 375), (200, 900)])
def test_windows_are_distributed_as_in_torchvision(width: int, height: int) -> None:
    """Largest distance of the cumulative distributions; with 20,000 draws it exceeds 0.025 with probability 1e-5."""
    count = 20_000
    sampled = AugmentSampler(0, CROP, (224, 224)).at(
        np.zeros(count, np.int64), np.arange(count), np.full(count, width), np.full(count, height)
    )
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    by_torchvision = np.array(
        [RandomResizedCrop.get_params(image, list(CROP.scale), list(CROP.ratio)) for _ in range(count)]
    )  # top, left, height, width
    for number, column in enumerate((1, 0, 3, 2)):
        grid = np.arange(max(width, height) + 1)
        distance = np.abs(
            np.searchsorted(np.sort(sampled.windows[:, number]), grid, "right")
            - np.searchsorted(np.sort(by_torchvision[:, column]), grid, "right")
        ).max()
        assert distance / count < 0.025


def test_parameters_do_not_depend_on_the_rest_of_the_batch() -> None:
    sampler = AugmentSampler(7, CROP, (224, 224))
    epochs, samples = np.array([0, 3, 3, 8]), np.array([5, 5, 6, 10**9])
    widths, heights = np.array([500, 500, 20, 3000]), np.array([375, 375, 4000, 2000])
    together = sampler.at(epochs, samples, widths, heights)
    for k in range(4):
        alone = sampler.at(*(column[k : k + 1] for column in (epochs, samples, widths, heights)))
        assert np.array_equal(alone.windows[0], together.windows[k])
        assert alone.flips[0] == together.flips[k] and alone.keys[0] == together.keys[k]


def test_half_of_the_images_flip_or_the_share_in_the_setting() -> None:
    count = 10_000
    columns = np.zeros(count, np.int64), np.arange(count), np.full(count, 64), np.full(count, 64)
    flips = AugmentSampler(0, CROP, (224, 224)).at(*columns).flips
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / math.sqrt(count)  # five standard errors
    assert not AugmentSampler(0, CropConfig(flip=0), (224, 224)).at(*columns).flips.any()
    assert AugmentSampler(0, CropConfig(flip=1), (224, 224)).at(*columns).flips.all()


def test_the_parameters_are_pinned() -> None:
    """If these numbers change, old runs resume with other crops, flips and masks."""
    two = np.array([0, 1])
    params = AugmentSampler(0, CROP, (224, 224)).at(two, two, np.array([500, 640]), np.array([375, 480]))
    assert params.windows.tolist() == [[295, 48, 192, 241], [311, 34, 271, 321]]
    assert params.flips.tolist() == [False, True]
    assert params.keys.tolist() == [4200738001716561462, -8575921941596432980]


GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "f64" / "rrc.npz")


@pytest.mark.parametrize("number", range(7))
def test_the_one_draw_crop_equals_the_linear_probing_reference(number: int) -> None:
    """Golden file: maps uniform numbers to boxes (top, left, height, width), without a generator."""
    width, height = GOLDEN["sizes_wh"][number]
    numbers = GOLDEN["u"][:, None, [0, 1, 3, 2]]  # in this project, left comes before top
    crop = CropConfig(sampler="one_draw", scale=(0.08, 1.0))
    windows = one_draw_crop(numbers, np.full(64, width), np.full(64, height), crop)
    assert np.array_equal(windows[:, [1, 0, 3, 2]], GOLDEN["u_boxes_ijhw"][number])


def test_the_one_draw_crop_is_distributed_as_in_the_reference() -> None:
    count, crop = 20_000, CropConfig(sampler="one_draw", scale=(0.08, 1.0))
    columns = np.zeros(count, np.int64), np.arange(count), np.full(count, 500), np.full(count, 375)
    windows = AugmentSampler(0, crop, (224, 224)).at(*columns).windows
    areas = windows[:, 2] * windows[:, 3] / (500 * 375)
    quantiles = np.quantile(areas, np.linspace(0, 1, 21))
    assert np.abs(quantiles - GOLDEN["stat_mae_area_q"]).max() < 0.015


@given(width=sides, height=sides, size=st.integers(1, 500), margin=st.floats(1, 2))
def test_resize_and_centre_crop_equal_torchvision(width: int, height: int, size: int, margin: float) -> None:
    """The arithmetic of Resize and CenterCrop for a square input, on the short side that the reference gives Resize."""
    (resize,) = resized_crop(None, np.array([width]), np.array([height]), (size, size), margin)
    short = int(size * margin + 1e-6)
    expected = _compute_resized_output_size((height, width), [short])
    assert resize[:2].tolist() == expected
    assert resize[2:].tolist() == [round((side - size) / 2.0) for side in expected]


def test_the_short_side_is_the_references_at_every_size() -> None:
    """`size = int(args.input_size / crop_pct)`, crop_pct 224 / 256 up to 224 px and 1 above; all sizes of 1 to 512."""
    for size in range(1, 513):
        crop_pct = 224 / 256 if size <= 224 else 1.0
        margin = evaluation_margin((size, size))
        for length in (1, size, 500, 5000):
            (resize,) = resized_crop(None, np.array([length]), np.array([length]), (size, size), margin)
            assert resize[:2].tolist() == [int(size / crop_pct)] * 2


@given(width=sides, height=sides, sample=st.integers(0, 10**6))
def test_a_fixed_size_crop_is_inside_the_resized_image_for_any_shape(width: int, height: int, sample: int) -> None:
    one = np.zeros(1, np.int64), np.array([sample]), np.array([width]), np.array([height])
    params = AugmentSampler(0, CropConfig("fixed_size"), (96, 192)).at(*one)
    resized_height, resized_width, top, left = params.resizes[0].tolist()
    assert 0 <= top <= resized_height - 96 and 0 <= left <= resized_width - 192
    x, y, window_width, window_height = params.windows[0].tolist()
    # 96 and 192 times 256 / 224, of the whole image
    scales = resized_height * height / window_height, resized_width * width / window_width
    assert scales[0] == pytest.approx(110) or scales[1] == pytest.approx(219)
    if scales[0] * scales[1] <= 2**22:
        assert params.windows[0].tolist() == [0, 0, width, height]
    else:
        assert 0 <= x <= x + window_width <= width and 0 <= y <= y + window_height <= height
        assert window_width * window_height < width * height or min(width, height) == 1


def test_fixed_size_crops_reach_every_edge() -> None:
    count = 5000
    columns = np.zeros(count, np.int64), np.arange(count), np.full(count, 500), np.full(count, 375)
    resizes = AugmentSampler(0, CropConfig("fixed_size"), (224, 224)).at(*columns).resizes
    assert set(resizes[:, 0]) == {256} and set(resizes[:, 1]) == {341}
    assert (resizes[:, 2].min(), resizes[:, 2].max()) == (0, 32) and (resizes[:, 3].min(), resizes[:, 3].max()) == (
        0,
        117,
    )


def test_jitter_factors_are_within_their_bounds_and_every_order_occurs() -> None:
    count = 5000
    columns = np.zeros(count, np.int64), np.arange(count), np.full(count, 500), np.full(count, 375)
    params = AugmentSampler(0, CropConfig(jitter=0.4), (224, 224)).at(*columns).pixel_augment
    assert AugmentSampler(0, CropConfig(), (224, 224)).at(*columns).pixel_augment is None
    assert params is not None and params.jitter_factors is not None and params.jitter_orders is not None
    assert 0.6 <= params.jitter_factors.min() < 0.61 and 1.39 < params.jitter_factors.max() <= 1.4
    assert len({tuple(order) for order in params.jitter_orders.tolist()}) == 6
    assert params.operations is None and params.erasing is None


def test_rand_augment_is_drawn_as_timm_draws_it() -> None:
    """Two of 15 operations, each skipped half the time; magnitude normal(9, 0.5), at most 10, of either sign."""
    count = 20_000
    columns = np.zeros(count, np.int64), np.arange(count), np.full(count, 500), np.full(count, 375)
    params = AugmentSampler(0, CropConfig(rand_augment=9.0), (224, 224)).at(*columns).pixel_augment
    assert params is not None and params.operations is not None and params.magnitudes is not None
    assert abs((params.operations < 0).mean() - 0.5) < 0.01
    counts = np.bincount(params.operations[params.operations >= 0], minlength=15)
    assert len(counts) == 15 and abs(counts / counts.mean() - 1).max() < 0.1
    sizes = np.abs(params.magnitudes)
    expected = np.clip(np.random.default_rng(0).normal(9, 0.5, sizes.size), 0, 10)
    assert (
        np.abs(np.quantile(sizes, np.linspace(0.01, 1, 50)) - np.quantile(expected, np.linspace(0.01, 1, 50))).max()
        < 0.03
    )
    assert abs((params.magnitudes < 0).mean() - 0.5) < 0.01


def test_boxes_are_erased_with_the_probability_and_size_of_the_setting() -> None:
    count = 20_000
    columns = np.zeros(count, np.int64), np.arange(count), np.full(count, 500), np.full(count, 375)
    params = AugmentSampler(0, CropConfig(erase=0.25), (224, 224)).at(*columns).pixel_augment
    assert params is not None and params.erasing is not None
    boxes = params.erasing.boxes
    assert len(set(params.erasing.keys.tolist())) == count
    left, top, width, height = boxes[boxes[:, 2] > 0].T
    assert abs(len(left) / count - 0.25) < 0.01
    assert (left >= 0).all() and (top >= 0).all() and (left + width <= 224).all() and (top + height <= 224).all()
    share = width * height / 224**2
    assert 0.018 < share.min() < 0.03 and 0.31 < share.max() < 0.34
    assert 0.28 < (height / width).min() < 0.35 and 2.9 < (height / width).max() < 3.5


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"margin": 0.9}, "a crop larger than the image"),
        ({"scale": (0.5, 1.5)}, "is not within 0..1"),
        ({"ratio": (2.0, 1.0)}, "no pair of widths"),
        ({"jitter": 1.0}, "jitter 1.0 in 0..1"),
    ],
)
def test_invalid_settings_are_rejected(values: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        CropConfig(**values)
