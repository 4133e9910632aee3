"""Augmentation draws: the crop window and the flip of each sample, for a whole batch at once.

The window is torchvision's RandomResizedCrop (paper, appendix A.1, table 8): up to ten tries at an area and an aspect
ratio, then the largest centred window of an allowed ratio. All tries are drawn at once; the first that fits counts.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64

from pipeline.hashing import sample_keys, seed_word, uniforms

_TRIES = 10


@dataclass(frozen=True)
class CropConfig:
    """What may be drawn."""

    scale: tuple[float, float] = (0.2, 1.0)
    """Least and largest share of the image's area that a window takes."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and largest width / height of a window."""
    flip: float = 0.5
    """Probability of a horizontal flip."""


@dataclass(frozen=True)
class Draws:
    """The draws of one batch."""

    windows: Int32[np.ndarray, "b 4"]  # left, top, width, height in pixels of the stored image
    flips: Bool[np.ndarray, "b"]
    keys: Int64[np.ndarray, "b"]  # what the masks are hashed from, on the device


@dataclass(frozen=True)
class AugmentDraws:
    """Every draw is a pure function of (seed, epoch, sample)."""

    seed: int
    crop: CropConfig

    def at(
        self,
        epochs: Int64[np.ndarray, "b"],
        samples: Int64[np.ndarray, "b"],
        widths: Int64[np.ndarray, "b"],
        heights: Int64[np.ndarray, "b"],
    ) -> Draws:
        """Windows, flips and mask keys of `samples` (their stored sizes in pixels) in `epochs`."""
        numbers = uniforms(sample_keys(seed_word(self.seed, "augment"), epochs, samples), 4 * _TRIES + 1)
        return Draws(
            windows=random_resized_crop(numbers[:, :-1].reshape(-1, _TRIES, 4), widths, heights, self.crop),
            flips=numbers[:, -1] < self.crop.flip,
            keys=sample_keys(seed_word(self.seed, "mask"), epochs, samples).view(np.int64),
        )


def random_resized_crop(
    numbers: np.ndarray, widths: np.ndarray, heights: np.ndarray, crop: CropConfig
) -> Int32[np.ndarray, "b 4"]:
    """Windows (left, top, width, height) from `numbers` in [0, 1), float64 (b, tries, 4): area, ratio, left, top."""
    widths, heights = widths.astype(np.int64), heights.astype(np.int64)
    area = (widths * heights)[:, None] * (crop.scale[0] + numbers[..., 0] * (crop.scale[1] - crop.scale[0]))
    log_low, log_high = np.log(crop.ratio)
    ratio = np.exp(log_low + numbers[..., 1] * (log_high - log_low))  # (B, tries)
    width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (0 < width) & (width <= widths[:, None]) & (0 < height) & (height <= heights[:, None])

    first = np.argmax(fits, axis=1)[:, None]  # (B, 1)
    width, height = (np.take_along_axis(tries, first, axis=1)[:, 0] for tries in (width, height))
    left_number, top_number = (np.take_along_axis(numbers[..., k], first, axis=1)[:, 0] for k in (2, 3))
    left = np.floor(left_number * (widths - width + 1)).astype(np.int64)
    top = np.floor(top_number * (heights - height + 1)).astype(np.int64)

    # No try fits an image far longer than the allowed ratios: the largest centred window of an allowed ratio.
    centre_width = np.minimum(widths, np.rint(heights * crop.ratio[1]).astype(np.int64)).clip(1)
    centre_height = np.minimum(heights, np.rint(widths / crop.ratio[0]).astype(np.int64)).clip(1)
    drawn = np.stack([left, top, width, height], axis=1)
    centre = np.stack(
        [(widths - centre_width) // 2, (heights - centre_height) // 2, centre_width, centre_height], axis=1
    )
    return np.where(fits.any(axis=1)[:, None], drawn, centre).astype(np.int32)  # (B, 4)
