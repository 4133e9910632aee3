"""Decoders: encoded bytes and augmentation parameters in, images (B, 3, H, W) out, on the CPU or the GPU.

DALI pulls batches through `external_source` from a callable of the iteration number, the only form that resumes
exactly. On the CPU, DALI's resize is the bottleneck. So there DALI decodes, and ATen's uint8 antialiased bicubic
resizes in threads, which is also closer to PIL's result (docs/pipeline.md). Our own models normalise, so a batch is
transferred as bytes; other models get it normalised (`pipeline/output.py`). Channels are last in memory, as decoders
write them and patches need them.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int32, Shaped, UInt8
from nvidia.dali import Pipeline, fn
from nvidia.dali.plugin.pytorch import feed_ndarray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from maelstream.pipeline.augment_params import AugmentParams
from maelstream.pipeline.config import DecodeConfig
from maelstream.pipeline.dali_graph import decoded_windows, resized_windows
from maelstream.pipeline.dct_scaling import STUB, decode_reduced_window, reduction
from maelstream.pipeline.erase import erase
from maelstream.pipeline.output import BufferPool, Output
from maelstream.pipeline.pixel_augment import PixelAugment, augment_pixels
from maelstream.pipeline.tracing import trace_range
from maelstream.shards.errors import MaelstreamError

_WIDENED = 2**24  # pixels between the two passes of a resize (48 MB)


@dataclass(frozen=True)
class EncodedBatch:
    """Input of a decoder: encoded images and their augmentation parameters (see `AugmentParams`)."""

    encoded: list[np.ndarray]  # file bytes of each image, uint8
    windows: Int32[np.ndarray, "b 4"]
    resizes: Float64[np.ndarray, "b 4"]
    flips: Bool[np.ndarray, "b"]
    pixel_augment: PixelAugment | None

    @classmethod
    def of(cls, encoded: list[np.ndarray], params: AugmentParams) -> "EncodedBatch":
        """The batch of `encoded` with the parameters drawn for it."""
        return cls(encoded, params.windows, params.resizes, params.flips, params.pixel_augment)


BatchSource = Callable[[int], EncodedBatch]
"""Returns the batch of an iteration, counted from 0 at the decoder's start."""


def decode_device(config: DecodeConfig) -> torch.device:
    """The device on which this process decodes.

    Raises:
        MaelstreamError: the configuration needs a GPU, and torch finds none.
    """
    if config.on == "gpu" and not torch.cuda.is_available():
        raise MaelstreamError("`decode.on: gpu` needs a GPU, and torch finds none; set `on: auto` or `on: cpu`")
    if config.on == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


class Decoded(NamedTuple):
    """Windows as DALI returns them, and the batch they were decoded from."""

    windows: Any
    batch: EncodedBatch
    reductions: np.ndarray


class CpuDecoder:
    """Decodes windows with DALI on `threads` threads; ATen resizes and flips them on as many."""

    def __init__(
        self,
        source: BatchSource,
        max_batch_size: int,
        image_size: tuple[int, int],
        threads: int,
        device: torch.device,
        output: Output = Output(),
        config: DecodeConfig = DecodeConfig(),
        ahead: int = 2,
    ):
        """`ahead` batches are decoded before they are asked for, each held in memory with all its stored pixels."""
        self._source, self._image_size, self._output, self._threads = source, image_size, output, threads
        self._buffers, self._dct_scaling = BufferPool(), config.dct_scaling
        self._in_dali: deque[tuple[EncodedBatch, np.ndarray]] = deque()  # pulled by DALI, not yet returned
        self._resizers = ThreadPoolExecutor(threads, "resize")
        self._pipeline = Pipeline(max_batch_size, threads, device_id=None, prefetch_queue_depth=ahead)
        with self._pipeline:
            encoded, start, shape = fn.external_source(self._feed, num_outputs=3)
            self._pipeline.set_outputs(decoded_windows(encoded, start, shape, "cpu", "window"))
        self._pipeline.build()

    def _feed(self, iteration: int) -> tuple:
        batch = self._source(iteration)
        reductions = np.ones(len(batch.encoded), int)
        encoded, windows = batch.encoded, batch.windows
        if self._dct_scaling:
            reductions = np.array([*map(reduction, encoded, windows, batch.resizes)])
            encoded = [STUB if times > 1 else data for data, times in zip(encoded, reductions, strict=True)]
            windows = np.where(reductions[:, None] > 1, np.array([0, 0, 1, 1], np.int32), windows)
        self._in_dali.append((batch, reductions))
        return encoded, windows[:, :2].copy(), windows[:, 2:].copy()  # copies, because DALI rejects strided arrays

    def close(self) -> None:
        """Ends its threads, and DALI's."""
        self._resizers.shutdown()
        del self._pipeline

    def run(self) -> Shaped[Tensor, "b 3 h w"]:
        """Images of the next iteration.

        Raises:
            RuntimeError: an image cannot be decoded; this decoder cannot be used any more.
        """
        with trace_range("decode"):
            decoded = self.decode()
        with trace_range("augment"):
            return self.augment(decoded)

    def decode(self) -> Decoded:
        """The next iteration's windows. Raises what `run` raises."""
        (windows,) = self._pipeline.run()
        return Decoded(windows, *self._in_dali.popleft())

    def augment(self, decoded: Decoded) -> Shaped[Tensor, "b 3 h w"]:
        """Resizes, crops and flips windows, and applies pixel augmentation."""
        windows, batch, reductions = decoded
        images = self._output.allocate(len(windows), self._image_size, self._buffers.take)  # (B, 3, H, W)
        erasing = batch.pixel_augment.erasing if batch.pixel_augment is not None and self._output.erase else None

        def resize(index: int) -> None:
            pixels = np.asarray(windows[index])  # `windows.at` would copy
            if reductions[index] > 1:
                pixels = decode_reduced_window(batch.encoded[index], batch.windows[index], reductions[index])
            image = resized_crop(pixels, batch.resizes[index], self._image_size)
            image = image.flip(-1) if batch.flips[index] else image
            image = augment_pixels(image, batch.pixel_augment, index, self._output.mean)
            self._output.write(images[index], image)
            if erasing is not None:
                erase(images[index : index + 1], erasing.of(index), self._output.mean, self._output.std)

        indices = iter(range(len(windows)))  # shared: each thread costs one hand-over per batch, and none idles

        def resize_some(_: int) -> None:
            for index in indices:
                resize(index)

        for _ in self._resizers.map(resize_some, range(self._threads)):
            pass  # waits for each thread, and raises what it raised
        return images


def resized_crop(
    pixels: UInt8[np.ndarray, "h w 3"], resize: Float64[np.ndarray, "4"], image_size: tuple[int, int]
) -> UInt8[Tensor, "3 h2 w2"]:
    """The crop of `image_size` from a window that is resized as `resize`, a row of `AugmentParams.resizes`, says."""
    height, width, top, left = resize.tolist()
    if any(value % 1 for value in (height, width, top, left)):
        # PIL resizes from parts of pixels; ATen, four times as fast, only whole images. They differ by a level or two.
        down, across = pixels.shape[0] / height, pixels.shape[1] / width
        box = (left * across, top * down, (left + image_size[1]) * across, (top + image_size[0]) * down)
        inside = [min(max(edge, 0), side) for edge, side in zip(box, pixels.shape[1::-1] * 2, strict=True)]
        crop = Image.fromarray(pixels).resize(image_size[::-1], Image.Resampling.BICUBIC, box=tuple(inside))
        return torch.from_numpy(np.array(crop)).permute(2, 0, 1)
    # The batch axis is added before the permutation: with the axis of length 1 added last, ATen infers channels-first
    # strides and writes its result so, which takes half as long again.
    window = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # (1, 3, h, w)
    size, bicubic = (int(height), int(width)), partial(interpolate, mode="bicubic", antialias=True)
    if len(pixels) * size[1] > _WIDENED:  # ATen resizes rows first
        window = bicubic(window, size=(size[0], pixels.shape[1]))
    return bicubic(window, size=size)[0, :, int(top) :, int(left) :][:, : image_size[0], : image_size[1]]


class GpuDecoder:
    """Decodes windows with nvJPEG on a CUDA device; DALI resizes and flips them there."""

    def __init__(
        self,
        source: BatchSource,
        max_batch_size: int,
        image_size: tuple[int, int],
        threads: int,
        device: torch.device,
        output: Output = Output(),
        config: DecodeConfig = DecodeConfig(),
    ):
        self._source, self._image_size, self._device, self._output = source, image_size, device, output
        self._in_dali: deque[PixelAugment | None] = deque()  # of batches pulled by DALI, not yet returned
        self._stream = torch.cuda.Stream(device)
        self._pipeline = Pipeline(max_batch_size, threads, device.index, prefetch_queue_depth=2)
        options = config.dali_gpu_options()
        with self._pipeline:
            self._pipeline.set_outputs(resized_windows(self._feed, image_size, "mixed", config.form, **options))
        self._pipeline.build()

    def _feed(self, iteration: int) -> tuple:
        batch = self._source(iteration)
        self._in_dali.append(batch.pixel_augment)
        return dali_inputs(batch)

    def close(self) -> None:
        """Ends DALI's threads."""
        del self._pipeline

    def run(self) -> Shaped[Tensor, "b 3 h w"]:
        """Images of the next iteration.

        Raises:
            RuntimeError: an image cannot be decoded; this decoder cannot be used any more.
        """
        with trace_range("decode"):
            (decoded,) = self._pipeline.run()
        with trace_range("augment"):
            return self._images(decoded)

    def _images(self, decoded: Any) -> Shaped[Tensor, "b 3 h w"]:
        """Copies images out of DALI's memory and applies pixel augmentation."""
        with torch.cuda.stream(self._stream):
            take = partial(torch.empty, dtype=torch.uint8, device=self._device)
            pixels = Output().allocate(len(decoded), self._image_size, take)  # (B, 3, H, W)
            feed_ndarray(decoded.as_tensor(), pixels.permute(0, 2, 3, 1), cuda_stream=self._stream)
            if (params := self._in_dali.popleft()) is not None:
                mean = self._output.mean
                pixels = torch.stack([augment_pixels(image, params, n, mean) for n, image in enumerate(pixels)])
            images = self._output.allocate(len(decoded), self._image_size, take)
            self._output.write(images, pixels)
            if params is not None and params.erasing is not None and self._output.erase:
                erase(images, params.erasing, self._output.mean, self._output.std)
        # Finish before DALI reuses `decoded`. The stream is separate because training's has whole steps queued.
        self._stream.synchronize()
        images.record_stream(torch.cuda.default_stream(self._device))  # where training reads and frees them
        return images  # (B, 3, H, W)


DECODERS: dict[str, type[CpuDecoder] | type[GpuDecoder]] = {"cpu": CpuDecoder, "cuda": GpuDecoder}
"""By type of device."""


def dali_inputs(batch: EncodedBatch) -> tuple:
    """Inputs of `resized_windows`: bytes, start and shape of windows, sizes, start of crops, flips."""
    windows, resizes = batch.windows, batch.resizes.astype(np.float32)
    starts = windows[:, :2].copy(), windows[:, 2:].copy()  # copies, because DALI rejects strided arrays
    return batch.encoded, *starts, resizes[:, :2].copy(), resizes[:, 2:].copy(), batch.flips.astype(np.int32)
