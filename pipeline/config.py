"""Settings of the data path: crops, pixel augmentation, mixup, decoding and the loader.

Plain dataclasses that import neither torch nor DALI, so that reading a recipe is cheap.
"""

from dataclasses import dataclass
from typing import Literal

Shuffle = Literal["global", "block", "none"]
"""See `pipeline/order.py`."""

STAGES = ("storage", "read", "decode", "augment", "copy", "step", "optimizer", "comm")
"""The stages of a run that can be measured alone, in the order in which an image passes through them."""

MARGIN = 256 / 224


def evaluation_margin(image_size: tuple[int, int]) -> float:
    """The reference's size of the resized image divided by the crop's: 256 / 224 up to 224 px, 1 above."""
    return MARGIN if max(image_size) <= 224 else 1.0


@dataclass(frozen=True)
class CropConfig:
    """Distribution from which the augmentation of each sample is drawn."""

    kind: Literal["random_size", "fixed_size", "none"] = "random_size"
    """random_size: a crop of random area and aspect ratio. fixed_size: the image is resized, then a crop of the model's
    size is cut at a random position. none: the centre crop without a flip, for evaluation."""
    sampler: Literal["ten_tries", "one_draw"] = "ten_tries"
    """For random_size. ten_tries: torchvision's RandomResizedCrop. one_draw: a single try, clamped to the image, as
    the reference does for linear probing."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a random_size crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a random_size crop."""
    margin: float | None = None
    """Size of the resized image divided by the size of the crop: 256 / 224 resizes the short side to 256 and crops
    224. Without a value, fixed_size and none take 256 / 224, and the evaluation of a classifier takes 256 / 224 up to
    224 px and 1 above, as the reference does."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.0
    """Brightness, contrast and saturation are each multiplied by 1 - jitter to 1 + jitter, in random order."""
    rand_augment: float = 0.0
    """Magnitude of RandAugment's two operations, 0 (off) to 10; fine-tuning uses 9."""
    erase: float = 0.0
    """Probability that a box of the image is erased; fine-tuning uses 0.25."""

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {self.scale} is not within 0..1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {self.ratio} is no pair of widths over heights")
        if self.margin is not None and self.margin < 1:
            raise ValueError(f"margin {self.margin}: a crop larger than the image; it must be at least 1")
        if not 0 <= self.flip <= 1 or not 0 <= self.jitter < 1:
            raise ValueError(f"flip {self.flip} must be in 0..1, jitter {self.jitter} in 0..1 without 1")
        if not 0 <= self.rand_augment <= 10 or not 0 <= self.erase <= 1:
            raise ValueError(f"rand_augment {self.rand_augment} must be in 0..10, erase {self.erase} in 0..1")


@dataclass(frozen=True)
class MixupConfig:
    """Mixup, CutMix and label smoothing; the defaults are the paper's (table 9)."""

    mixup: float = 0.8
    """Alpha of the Beta distribution of mixup's weight for the first image; 0: no mixup."""
    cutmix: float = 1.0
    """Alpha of the Beta distribution of CutMix's area share; 0: no CutMix. If both are on, each batch uses one of them
    with equal probability."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""

    def __post_init__(self) -> None:
        if min(self.mixup, self.cutmix) < 0 or not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"mixup {self.mixup} and cutmix {self.cutmix} must not be negative, label_smoothing "
                f"{self.label_smoothing} in 0..1"
            )


@dataclass(frozen=True)
class DecodeConfig:
    """How and where images are decoded."""

    on: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: the GPU if there is one, otherwise the CPU."""
    dct_scaling: bool = False
    """On a CPU, decode JPEGs at a half, quarter or eighth of their size if that still covers the crop. Faster for
    images at least twice as large as the model's input, but the pixels differ (docs/measured/pipeline.md)."""
    form: Literal["window", "full"] = "window"
    """On a GPU, decode only the crop window, or decode the full image and crop then. full uses another code path of
    nvJPEG: nvImageCodec issue 55 reports crashes of window decoding on an H100."""
    hw_decoder_load: float = 0.65
    """Share of the images that the GPU's hardware JPEG decoder gets, if there is one."""
    preallocate: tuple[int, int] = (0, 0)
    """Width and height in pixels for which GPU memory is allocated at the start. Larger images allocate later, which
    delays decoding."""

    def __post_init__(self) -> None:
        if not 0 <= self.hw_decoder_load <= 1 or min(self.preallocate) < 0:
            raise ValueError(
                f"hw_decoder_load {self.hw_decoder_load} must be in 0..1, preallocate {self.preallocate} not negative"
            )

    def dali_gpu_options(self) -> dict[str, float]:
        """Arguments of DALI's GPU decoders."""
        width, height = self.preallocate
        return {
            "hw_decoder_load": self.hw_decoder_load,
            "preallocate_width_hint": width,
            "preallocate_height_hint": height,
        }


@dataclass(frozen=True)
class LoaderConfig:
    """How the loader of each rank works; the samples in a batch do not depend on it."""

    threads: int = 0
    """Decoding threads per rank, and on a CPU as many that resize; 0: the machine's cores divided by its ranks."""
    prefetch: int = 4
    """Micro-batches that are read ahead of the step; as many are decoded ahead."""
    decode: DecodeConfig = DecodeConfig()
    max_bad_share: float = 0.001
    """Share of the dataset's samples that may be bad and replaced; above it, the run stops."""

    def __post_init__(self) -> None:
        if self.threads < 0 or self.prefetch < 1:
            raise ValueError(f"threads {self.threads} must be at least 0, prefetch {self.prefetch} at least 1")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share {self.max_bad_share} is not in 0..1")
