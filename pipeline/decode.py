"""The DALI graphs: encoded bytes, crop windows and flips in; images out, (B, 3, H, W), on the CPU or the GPU.

Both graphs are fed through `external_source` by a callable of the iteration number, the only form that resumes exactly,
and decode nothing but the window (`image_slice`), ignoring the EXIF orientation as torchvision and PIL do. On the CPU,
DALI's resize is the bottleneck, so there DALI decodes and ATen's uint8 antialiased bicubic resizes, in threads, which
is also closer to PIL's result (docs/pipeline.md). Our own models normalise, so that a batch travels as bytes; for
others it can be had normalised. In memory the channels come last, as decoders write them and patches want them.
"""

import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int32, Shaped, UInt8
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor
from torch.nn.functional import interpolate

from maelstream.pipeline.augment_params import AugmentParams
from maelstream.pipeline.dct_scaling import STUB, reduction, window_of_scaled
from maelstream.pipeline.pixel_augment import PixelAugment, changed
from maelstream.pipeline.tracing import stage
from maelstream.shards.errors import MaelstreamError


@dataclass(frozen=True)
class EncodedBatch:
    """What a decoder needs of one batch."""

    encoded: list[np.ndarray]  # uint8, one array of file bytes an image
    windows: Int32[np.ndarray, "b 4"]  # to decode: left, top, width, height in pixels
    resizes: Int32[np.ndarray, "b 4"]  # of the window: height, width; then to crop from it: top, left
    flips: Bool[np.ndarray, "b"]
    changes: PixelAugment | None

    @classmethod
    def of(cls, encoded: list[np.ndarray], draws: AugmentParams) -> "EncodedBatch":
        """The bytes with what was drawn for them."""
        return cls(encoded, draws.windows, draws.resizes, draws.flips, draws.changes)


@dataclass(frozen=True)
class Output:
    """What images are handed over as."""

    dtype: Literal["uint8", "float32", "float16", "bfloat16"] = "uint8"
    """Bytes as decoded, or (value / 255 - mean) / std."""
    channels_last: bool = True
    """Layout in memory; the shape is (B, 3, H, W) either way."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def empty(
        self, count: int, image_size: tuple[int, int], take: Callable[[int], UInt8[Tensor, "size"]]
    ) -> Shaped[Tensor, "b 3 h w"]:
        """Room for `count` images, in memory that `take` gives."""
        dtype, (height, width) = getattr(torch, self.dtype), image_size
        memory = take(count * 3 * height * width * dtype.itemsize).view(dtype)
        if self.channels_last:
            return memory.view(count, height, width, 3).permute(0, 3, 1, 2)
        return memory.view(count, 3, height, width)

    def put(self, room: Tensor, images: UInt8[Tensor, "*b 3 h w"]) -> None:
        """Writes images as they are to be handed over; computed in float32, and rounded once where that is not the end.

        In place: 24 microseconds an image of 224 px, and 190 with results of their own.
        """
        if self.dtype == "uint8":
            room.copy_(images)
            return
        levels = room.copy_(images) if self.dtype == "float32" else images.float()
        if self.channels_last:  # whole rows, since three channels are too short to be worked on side by side
            shift, scale = _shift_and_scale(self.mean, self.std, images.shape[-1], room.device)
            levels.movedim(-3, -1).flatten(-2).mul_(scale).add_(shift)  # (*B, H, W*3)
        else:
            shift, scale = _shift_and_scale(self.mean, self.std, 1, room.device)
            levels.mul_(scale[:, None, None]).add_(shift[:, None, None])
        if levels is not room:
            room.copy_(levels)


@lru_cache(8)
def _shift_and_scale(
    mean: tuple[float, ...], std: tuple[float, ...], repeats: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What turns levels 0..255 into (level / 255 - mean) / std, of each channel in turn, `repeats` times over."""
    means, stds = (torch.tensor(values, device=device).repeat(repeats) for values in (mean, std))
    return -means / stds, 1 / (255 * stds)


@dataclass(frozen=True)
class DecodeConfig:
    """How images are decoded."""

    on: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto` is the GPU where there is one."""
    dct_scaling: bool = False
    """On a CPU, decode JPEGs at a half, quarter or eighth of their size where that covers the crop: faster for images
    twice as large as the model's, but other pixels, and not those of a run without it (docs/measured/pipeline.md)."""
    form: Literal["window", "full"] = "window"
    """On a GPU, decode nothing but the window, or all of the image, of which the window is then cut: another path
    through nvJPEG, at hand because nvImageCodec issue 55 has window decoding crash on an H100."""
    hw_decoder_load: float = 0.65
    """Share of the images that the GPU's JPEG decoder gets, where it has one."""
    preallocate: tuple[int, int] = (0, 0)
    """Width and height in pixels that a GPU makes room for at the start; larger images make decoding wait for more."""

    def __post_init__(self) -> None:
        if not 0 <= self.hw_decoder_load <= 1 or min(self.preallocate) < 0:
            raise ValueError(
                f"hw_decoder_load {self.hw_decoder_load} must be in 0..1, preallocate {self.preallocate} not negative"
            )

    @property
    def device(self) -> torch.device:
        """Where this process decodes. MaelstreamError for a GPU where there is none."""
        if self.on == "gpu" and not torch.cuda.is_available():
            raise MaelstreamError("decoding on a GPU was asked for, and torch finds none; take `on: auto` or `on: cpu`")
        if self.on == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def of_gpu(self) -> dict[str, float]:
        """Arguments of DALI's decoders on a GPU."""
        width, height = self.preallocate
        return {
            "hw_decoder_load": self.hw_decoder_load,
            "preallocate_width_hint": width,
            "preallocate_height_hint": height,
        }


Source = Callable[[int], EncodedBatch]
"""The batch of an iteration, counted from 0 at the decoder's start."""


class Decoded(NamedTuple):
    """Windows as DALI hands them over, and what they were made of."""

    windows: Any
    batch: EncodedBatch
    reductions: np.ndarray


class CpuDecoder:
    """DALI decodes the windows on `threads` threads; ATen resizes and flips them on as many."""

    def __init__(
        self,
        source: Source,
        max_batch_size: int,
        image_size: tuple[int, int],
        threads: int,
        device: torch.device,
        output: Output = Output(),
        config: DecodeConfig = DecodeConfig(),
    ):
        self._source, self._image_size, self._output, self._threads = source, image_size, output, threads
        self._rooms, self._dct_scaling = _Rooms(), config.dct_scaling
        self._taken: deque[tuple[EncodedBatch, np.ndarray]] = deque()  # by DALI, not yet handed out
        self._resizers = ThreadPoolExecutor(threads, "resize")
        self._pipeline = Pipeline(max_batch_size, threads, device_id=None, prefetch_queue_depth=2)
        with self._pipeline:
            encoded, start, shape = fn.external_source(self._feed, num_outputs=3)
            self._pipeline.set_outputs(_decode_window(encoded, start, shape, "cpu"))
        self._pipeline.build()

    def _feed(self, iteration: int) -> tuple:
        batch = self._source(iteration)
        reductions = np.ones(len(batch.encoded), int)
        encoded, windows = batch.encoded, batch.windows
        if self._dct_scaling:
            reductions = np.array([*map(reduction, encoded, windows, batch.resizes)])
            encoded = [STUB if times > 1 else data for data, times in zip(encoded, reductions, strict=True)]
            windows = np.where(reductions[:, None] > 1, np.array([0, 0, 1, 1], np.int32), windows)
        self._taken.append((batch, reductions))
        return encoded, windows[:, :2].copy(), windows[:, 2:].copy()  # copies, since DALI refuses strided arrays

    def run(self) -> Shaped[Tensor, "b 3 h w"]:
        """Images of the next iteration. RuntimeError when one cannot be decoded: the decoder is then of no use."""
        with stage("decode"):
            decoded = self.decode()
        with stage("augment"):
            return self.augment(decoded)

    def decode(self) -> Decoded:
        """The next iteration's windows; RuntimeError as `run`."""
        (windows,) = self._pipeline.run()
        return Decoded(windows, *self._taken.popleft())

    def augment(self, decoded: Decoded) -> Shaped[Tensor, "b 3 h w"]:
        """Windows resized, flipped and changed."""
        windows, taken, reductions = decoded
        images = self._output.empty(len(windows), self._image_size, self._rooms.take)  # (B, 3, H, W)

        def resize(number: int) -> None:
            # `windows.at` would copy. Where the axis of length 1 was added last, ATen would take its strides for those
            # of channels that come first, and answer so, which takes half as long again.
            pixels = np.asarray(windows[number])
            if reductions[number] > 1:
                pixels = window_of_scaled(taken.encoded[number], taken.windows[number], reductions[number])
            window = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # (1, 3, h, w)
            height, width, top, left = taken.resizes[number].tolist()
            image = interpolate(window, size=(height, width), mode="bicubic", antialias=True)[0]
            image = image[:, top : top + self._image_size[0], left : left + self._image_size[1]]
            image = image.flip(-1) if taken.flips[number] else image
            image = changed(image, taken.changes, number, self._output.mean, self._output.std)
            self._output.put(images[number], image)

        left = iter(range(len(windows)))  # shared, so that a thread costs one hand-over a batch and none idles

        def resize_some(_: int) -> None:
            for number in left:
                resize(number)

        for _ in self._resizers.map(resize_some, range(self._threads)):
            pass  # waits for each, and raises what one of them raised
        return images


class _Rooms:
    """Memory of batches, used again when the last view of a batch is gone.

    The system hands large blocks out anew page by page, zeroed: a fifth of the time of a batch of 64 float32 images.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, size: int) -> UInt8[Tensor, "size"]:
        """`size` bytes, with anything in them."""
        while self._free:
            block = self._free.pop()
            if len(block) >= size:
                break
        else:
            block = np.empty(size, np.uint8)
        view = block[:size]  # torch holds on to it for as long as a tensor shares the memory
        weakref.finalize(view, self._free.append, block).atexit = False
        return torch.from_numpy(view)


class GpuDecoder:
    """nvJPEG decodes the windows on a CUDA device; DALI resizes and flips them there."""

    def __init__(
        self,
        source: Source,
        max_batch_size: int,
        image_size: tuple[int, int],
        threads: int,
        device: torch.device,
        output: Output = Output(),
        config: DecodeConfig = DecodeConfig(),
    ):
        self._source, self._image_size, self._device, self._output = source, image_size, device, output
        self._changes: deque[PixelAugment | None] = deque()  # of the batches that DALI has taken but not yet handed out
        self._stream = torch.cuda.Stream(device)
        self._pipeline = Pipeline(max_batch_size, threads, device.index, prefetch_queue_depth=2)
        with self._pipeline:
            self._pipeline.set_outputs(resized_windows(self._feed, image_size, "mixed", config.form, **config.of_gpu()))
        self._pipeline.build()

    def _feed(self, iteration: int) -> tuple:
        batch = self._source(iteration)
        self._changes.append(batch.changes)
        return dali_inputs(batch)

    def run(self) -> Shaped[Tensor, "b 3 h w"]:
        """Images of the next iteration. RuntimeError when one cannot be decoded: the decoder is then of no use."""
        with stage("decode"):
            (decoded,) = self._pipeline.run()
        with stage("augment"):
            return self._images(decoded)

    def _images(self, decoded: Any) -> Shaped[Tensor, "b 3 h w"]:
        """Out of DALI's memory, with the changes made."""
        with torch.cuda.stream(self._stream):
            take = partial(torch.empty, dtype=torch.uint8, device=self._device)
            pixels = Output().empty(len(decoded), self._image_size, take)  # (B, 3, H, W)
            feed_ndarray(decoded.as_tensor(), pixels.permute(0, 2, 3, 1), cuda_stream=self._stream)
            if (changes := self._changes.popleft()) is not None:
                noise = self._output.mean, self._output.std
                pixels = torch.stack([changed(image, changes, number, *noise) for number, image in enumerate(pixels)])
            images = self._output.empty(len(decoded), self._image_size, take)
            self._output.put(images, pixels)
        # Done before DALI reuses `decoded`; on a stream of its own, since training's has whole steps queued.
        self._stream.synchronize()
        images.record_stream(torch.cuda.default_stream(self._device))  # where training reads and frees them
        return images  # (B, 3, H, W)


DECODERS: dict[str, type[CpuDecoder] | type[GpuDecoder]] = {"cpu": CpuDecoder, "cuda": GpuDecoder}


def dali_inputs(batch: EncodedBatch) -> tuple:
    """What `resized_windows` is fed: bytes, start and shape of windows, sizes, start of crops, flips."""
    windows, resizes = batch.windows, batch.resizes
    starts = windows[:, :2].copy(), windows[:, 2:].copy()  # DALI refuses strided arrays
    return (
        batch.encoded,
        *starts,
        resizes[:, :2].astype(np.float32),
        resizes[:, 2:].copy(),
        batch.flips.astype(np.int32),
    )


# DALI's nodes have no types.


def resized_windows(  # type: ignore[no-untyped-def]
    feed: Callable[[int], tuple], image_size: tuple[int, int], device: str, form: str, **decoder: Any
):
    """DALI node: images of `image_size`, HWC, from what `dali_inputs` gives; decoded on "mixed" (the GPU) or "cpu"."""
    encoded, start, shape, size, crop, flip = fn.external_source(feed, num_outputs=6)
    windows = decoded_windows(encoded, start, shape, device, form, **decoder)
    return resized(windows, size, crop, flip, image_size)


def decoded_windows(encoded, start, shape, device: str, form: str, **decoder: Any):  # type: ignore[no-untyped-def]
    """DALI node: the window of each image, HWC, RGB; `form` as in `DecodeConfig`."""
    if form == "window":
        return _decode_window(encoded, start, shape, device, **decoder)
    images = fn.decoders.image(encoded, device=device, output_type=types.RGB, adjust_orientation=False, **decoder)
    return fn.slice(images, start=start, shape=shape, axis_names="WH")


def resized(windows, size, crop, flip, image_size: tuple[int, int]):  # type: ignore[no-untyped-def]
    """DALI node: windows resized, cropped to `image_size` and flipped."""
    images = fn.resize(windows, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
    images = fn.slice(images, start=crop, shape=list(image_size), axes=[0, 1])
    return fn.flip(images, horizontal=flip)


def _decode_window(encoded, start, shape, device: str, **decoder: Any):  # type: ignore[no-untyped-def]
    """DALI node: the window of each image, HWC, RGB."""
    return fn.decoders.image_slice(
        encoded,
        start=start,
        shape=shape,
        axis_names="WH",
        device=device,
        output_type=types.RGB,
        adjust_orientation=False,
        **decoder,
    )
