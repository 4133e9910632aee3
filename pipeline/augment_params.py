"""Augmentation parameters: crop window, flip and pixel augmentation of each sample, drawn for a whole batch at once.

The paper compares four kinds (Table 1): none (the centre crop), fixed size, random size, and random size with colour
jitter. The random size is torchvision's RandomResizedCrop (appendix A.1, table 8): up to ten tries at an area and an
aspect ratio, then the largest centred window of an allowed ratio. Linear probing uses the reference's single try.
Random-size windows are drawn in pixels of the stored image, so only the window is decoded. For the other two, the whole
image is resized first, as torchvision's Resize and CenterCrop do for evaluation. Of a very long image, only the part
that the crop needs is decoded and resized.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from maelstream.pipeline.config import MARGIN, CropConfig
from maelstream.pipeline.erase import Erasing
from maelstream.pipeline.hashing import sample_keys, seed_word, uniforms
from maelstream.pipeline.pixel_augment import OPERATIONS, PixelAugment

_TRIES = 10
_LAYERS, _MAGNITUDE_STD = 2, 0.5  # of RandAugment
_RESIZED_WHOLE = 2**22  # pixels of a resized image (12 MB): a square of 224 px from one 54 times as long as it is wide


@dataclass(frozen=True)
class AugmentParams:
    """Augmentation parameters of one batch."""

    windows: Int32[np.ndarray, "b 4"]  # left, top, width, height in pixels of the stored image
    resizes: Float64[np.ndarray, "b 4"]
    """Height and width to resize the window to; top and left of the final crop from that. Whole numbers, except for
    windows of very long images: there, positions in the resized window are positions in the resized image."""
    flips: Bool[np.ndarray, "b"]
    keys: Int64[np.ndarray, "b"]  # hashed into masks on the device
    pixel_augment: PixelAugment | None


@dataclass(frozen=True)
class AugmentSampler:
    """Draws augmentation parameters as a pure function of (seed, epoch, sample)."""

    seed: int
    crop: CropConfig
    image_size: tuple[int, int]
    """Height and width of the model's input in pixels."""

    def at(
        self,
        epochs: Int64[np.ndarray, "b"],
        samples: Int64[np.ndarray, "b"],
        widths: Int64[np.ndarray, "b"],
        heights: Int64[np.ndarray, "b"],
    ) -> AugmentParams:
        """Parameters for `samples` in `epochs`; `widths` and `heights` are those of the stored images in pixels."""
        crop, count = self.crop, len(samples)
        numbers = uniforms(sample_keys(seed_word(self.seed, "augment"), epochs, samples), 4 * _TRIES + 1)
        tries = numbers[:, :-1].reshape(-1, _TRIES, 4)
        if crop.kind == "random_size":
            sampler = random_resized_crop if crop.sampler == "ten_tries" else one_draw_crop
            windows = sampler(tries, widths, heights, crop)
            resizes = np.tile(np.array([*self.image_size, 0.0, 0.0]), (count, 1))
        else:
            at = tries[:, 0, 2:] if crop.kind == "fixed_size" else None
            resizes = resized_crop(at, widths, heights, self.image_size, crop.margin or MARGIN)
            windows, resizes = needed_windows(widths, heights, resizes, self.image_size)
        augments_pixels = crop.jitter or crop.rand_augment or crop.erase
        return AugmentParams(
            windows=windows,
            resizes=resizes,
            flips=(numbers[:, -1] < crop.flip) & (crop.kind != "none"),
            keys=sample_keys(seed_word(self.seed, "mask"), epochs, samples).view(np.int64),
            pixel_augment=self._pixel_augment(epochs, samples) if augments_pixels else None,
        )

    def _pixel_augment(self, epochs: np.ndarray, samples: np.ndarray) -> PixelAugment:
        crop = self.crop
        factors = orders = operations = magnitudes = erasing = None

        def numbers(purpose: str, count: int) -> np.ndarray:
            return uniforms(sample_keys(seed_word(self.seed, purpose), epochs, samples), count)  # (B, count)

        if crop.jitter:
            drawn = numbers("jitter", 6)
            factors, orders = 1 + crop.jitter * (2 * drawn[:, :3] - 1), np.argsort(drawn[:, 3:], axis=1)
        if crop.rand_augment:
            drawn = numbers("randaug", 5 * _LAYERS).reshape(-1, _LAYERS, 5)
            which = np.floor(drawn[..., 0] * OPERATIONS).astype(np.int64)
            operations = np.where(drawn[..., 1] < 0.5, which, -1)
            normal = np.sqrt(-2 * np.log1p(-drawn[..., 2])) * np.cos(2 * np.pi * drawn[..., 3])  # Box-Muller
            size = np.clip(crop.rand_augment + _MAGNITUDE_STD * normal, 0, 10)
            magnitudes = np.where(drawn[..., 4] < 0.5, size, -size)
        if crop.erase:
            drawn = numbers("erase", 1 + 4 * _TRIES)
            boxes = boxes_to_erase(drawn[:, 1:].reshape(-1, _TRIES, 4), self.image_size)
            boxes[drawn[:, 0] >= crop.erase] = 0
            noise_keys = sample_keys(seed_word(self.seed, "noise"), epochs, samples).view(np.int64)
            erasing = Erasing(boxes, noise_keys)
        return PixelAugment(factors, orders, operations, magnitudes, erasing)


def boxes_to_erase(numbers: Float64[np.ndarray, "b tries 4"], image_size: tuple[int, int]) -> Int32[np.ndarray, "b 4"]:
    """Boxes to erase (left, top, width, height): the first try that fits into the image; width 0 if none does.

    Each covers 2 % to a third of the image, with height / width of 0.3 to 1 / 0.3 (Zhong et al., arXiv 1708.04896).
    """
    image_height, image_width = image_size
    area = image_height * image_width * (0.02 + numbers[..., 0] * (1 / 3 - 0.02))  # (B, tries)
    aspect = np.exp(np.log(0.3) * (1 - 2 * numbers[..., 1]))
    height, width = np.rint(np.sqrt(area * aspect)).astype(int), np.rint(np.sqrt(area / aspect)).astype(int)
    fits = (height < image_height) & (width < image_width)
    first = np.argmax(fits, axis=1)[:, None]
    height, width, left, top = (
        np.take_along_axis(column, first, axis=1)[:, 0] for column in (height, width, numbers[..., 2], numbers[..., 3])
    )
    left = np.floor(left * (image_width - width + 1)).astype(int)
    top = np.floor(top * (image_height - height + 1)).astype(int)
    boxes = np.stack([left, top, width, height], axis=1)
    return np.where(fits.any(axis=1, keepdims=True), boxes, 0).astype(np.int32)  # (B, 4)


def resized_crop(
    at: Float64[np.ndarray, "b 2"] | None,
    widths: np.ndarray,
    heights: np.ndarray,
    image_size: tuple[int, int],
    margin: float,
) -> Float64[np.ndarray, "b 4"]:
    """Height and width to resize whole images to, and top and left of the crop of `image_size`; whole numbers.

    The resized image is the smallest that contains `margin` times `image_size`. The crop is its centre: the short side
    is truncated as in the reference, `int(size / crop_pct)`, the rest as in torchvision's Resize and CenterCrop. Or
    `at` gives the left and top of the crop as uniform numbers in [0, 1).
    """
    sides = np.stack([heights, widths], axis=1).astype(np.int64)  # (B, 2)
    goals = np.array(image_size) * margin  # (2,)
    # 256 / 224 is not exact. Random crops are rounded, so that those of old runs stay the same.
    goals = (np.floor(goals + 1e-6) if at is None else np.rint(goals)).astype(np.int64)
    binding = np.argmax(goals / sides, axis=1)[:, None]  # the side that is shorter relative to its goal
    goal, side = goals[binding], np.take_along_axis(sides, binding, axis=1)  # (B, 1)
    resized = np.where(np.arange(2) == binding, goal, goal * sides // side)  # (B, 2)
    resized = np.maximum(resized, image_size)
    free = resized - np.array(image_size)
    start = np.rint(free / 2).astype(np.int64) if at is None else np.floor(at[:, ::-1] * (free + 1)).astype(np.int64)
    return np.concatenate([resized, start], axis=1).astype(np.float64)  # (B, 4)


def needed_windows(
    widths: np.ndarray, heights: np.ndarray, resizes: Float64[np.ndarray, "b 4"], image_size: tuple[int, int]
) -> tuple[Int32[np.ndarray, "b 4"], Float64[np.ndarray, "b 4"]]:
    """Windows (left, top, width, height) to decode for crops of resized images, and `resizes` of these windows.

    A window is the whole image, or the part that the crop and the support of the bicubic filter cover if the whole
    resized image would take much memory.
    """
    sides = np.stack([heights, widths], axis=1).astype(np.int64)  # (B, 2)
    resized, start = resizes[:, :2], resizes[:, 2:]
    scale = sides / resized  # stored pixels per resized pixel
    reach = 2 * np.maximum(scale, 1) + 1
    first = np.floor(scale * start - reach).clip(0).astype(np.int64)
    end = np.ceil(scale * (start + np.array(image_size)) + reach).astype(np.int64).clip(max=sides)
    whole = resized.prod(axis=1, keepdims=True) <= max(_RESIZED_WHOLE, 4 * image_size[0] * image_size[1])
    first, end = np.where(whole, 0, first), np.where(whole, sides, end)
    shape = end - first
    # Products before quotients: they are exact, so that the resize of a whole side stays a whole number.
    parts = np.where(shape == sides, resized, shape * resized / sides), start - first * resized / sides
    windows = np.concatenate([first[:, ::-1], shape[:, ::-1]], axis=1).astype(np.int32)
    return windows, np.concatenate(parts, axis=1)  # (B, 4) each


def one_draw_crop(
    numbers: np.ndarray, widths: np.ndarray, heights: np.ndarray, crop: CropConfig
) -> Int32[np.ndarray, "b 4"]:
    """As `random_resized_crop`, but only from the first try, with its width and height clamped to the image."""
    widths, heights = widths.astype(np.int64), heights.astype(np.int64)
    width, height = (side[:, 0] for side in _drawn_sides(numbers[:, :1], widths, heights, crop))
    width, height = np.minimum(width, widths).clip(1), np.minimum(height, heights).clip(1)
    left = np.floor(numbers[:, 0, 2] * (widths - width + 1)).astype(np.int64)
    top = np.floor(numbers[:, 0, 3] * (heights - height + 1)).astype(np.int64)
    return np.stack([left, top, width, height], axis=1).astype(np.int32)  # (B, 4)


def _drawn_sides(
    numbers: np.ndarray, widths: np.ndarray, heights: np.ndarray, crop: CropConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Width and height of each try, (b, tries), whether or not they fit into the image."""
    area = (widths * heights)[:, None] * (crop.scale[0] + numbers[..., 0] * (crop.scale[1] - crop.scale[0]))
    log_low, log_high = np.log(crop.ratio)
    ratio = np.exp(log_low + numbers[..., 1] * (log_high - log_low))  # (B, tries)
    return np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)


def random_resized_crop(
    numbers: np.ndarray, widths: np.ndarray, heights: np.ndarray, crop: CropConfig
) -> Int32[np.ndarray, "b 4"]:
    """Windows (left, top, width, height) from `numbers` in [0, 1), float64 (b, tries, 4): area, ratio, left, top."""
    widths, heights = widths.astype(np.int64), heights.astype(np.int64)
    width, height = _drawn_sides(numbers, widths, heights, crop)
    fits = (0 < width) & (width <= widths[:, None]) & (0 < height) & (height <= heights[:, None])

    first = np.argmax(fits, axis=1)[:, None]  # (B, 1)
    width, height = (np.take_along_axis(tries, first, axis=1)[:, 0] for tries in (width, height))
    left_number, top_number = (np.take_along_axis(numbers[..., k], first, axis=1)[:, 0] for k in (2, 3))
    left = np.floor(left_number * (widths - width + 1)).astype(np.int64)
    top = np.floor(top_number * (heights - height + 1)).astype(np.int64)

    # No try fits an image that is much longer than the allowed ratios: use the largest centred window of one.
    centre_width = np.minimum(widths, np.rint(heights * crop.ratio[1]).astype(np.int64)).clip(1)
    centre_height = np.minimum(heights, np.rint(widths / crop.ratio[0]).astype(np.int64)).clip(1)
    drawn = np.stack([left, top, width, height], axis=1)
    centre = np.stack(
        [(widths - centre_width) // 2, (heights - centre_height) // 2, centre_width, centre_height], axis=1
    )
    return np.where(fits.any(axis=1, keepdims=True), drawn, centre).astype(np.int32)  # (B, 4)
