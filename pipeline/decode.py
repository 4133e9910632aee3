"""The DALI graphs: encoded bytes, crop windows and flips in; uint8 images out, (B, 3, H, W), on the CPU or the GPU.

Both graphs are fed through `external_source` by a callable of the iteration number, the only form that resumes exactly,
and decode nothing but the window (`image_slice`), ignoring the EXIF orientation as torchvision and PIL do. On the CPU,
DALI's resize is the bottleneck, so there DALI decodes and ATen's uint8 antialiased bicubic resizes, in threads, which
is also closer to PIL's result (docs/pipeline.md). Normalisation belongs to the model: a batch travels as bytes.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int32, UInt8
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor
from torch.nn.functional import interpolate


@dataclass(frozen=True)
class EncodedBatch:
    """What a decoder needs of one batch."""

    encoded: list[np.ndarray]  # uint8, one array of file bytes an image
    windows: Int32[np.ndarray, "b 4"]  # left, top, width, height in pixels
    flips: Bool[np.ndarray, "b"]


Source = Callable[[int], EncodedBatch]
"""The batch of an iteration, counted from 0 at the decoder's start."""


class CpuDecoder:
    """DALI decodes the windows on `threads` threads; ATen resizes and flips them on as many."""

    def __init__(
        self, source: Source, max_batch_size: int, image_size: tuple[int, int], threads: int, device: torch.device
    ):
        self._source, self._image_size, self._device = source, image_size, device
        self._flips: deque[np.ndarray] = deque()  # of the batches that DALI has taken but not yet handed out
        self._resizers = ThreadPoolExecutor(threads, "resize")
        self._pipeline = Pipeline(max_batch_size, threads, device_id=None, prefetch_queue_depth=2)
        with self._pipeline:
            encoded, start, shape = fn.external_source(self._feed, num_outputs=3)
            self._pipeline.set_outputs(_decode_window(encoded, start, shape, "cpu"))
        self._pipeline.build()

    def _feed(self, iteration: int) -> tuple:
        batch = self._source(iteration)
        self._flips.append(batch.flips)
        # copies, since DALI refuses strided arrays
        return batch.encoded, batch.windows[:, :2].copy(), batch.windows[:, 2:].copy()

    def run(self) -> UInt8[Tensor, "b 3 h w"]:
        """Images of the next iteration. RuntimeError when one cannot be decoded: the decoder is then of no use."""
        (windows,) = self._pipeline.run()
        flips = self._flips.popleft()
        images = torch.empty(
            (len(windows), 3, *self._image_size), dtype=torch.uint8, device=self._device
        )  # (B, 3, H, W)

        def resize(number: int) -> None:
            window = torch.from_numpy(np.asarray(windows.at(number))).permute(2, 0, 1)[None]  # (1, 3, h, w)
            image = interpolate(window, size=self._image_size, mode="bicubic", antialias=True)[0]
            images[number] = image.flip(-1) if flips[number] else image

        for _ in self._resizers.map(resize, range(len(windows))):
            pass  # waits for each, and raises what one of them raised
        return images


class GpuDecoder:
    """nvJPEG decodes the windows on a CUDA device; DALI resizes and flips them there."""

    def __init__(
        self, source: Source, max_batch_size: int, image_size: tuple[int, int], threads: int, device: torch.device
    ):
        self._source, self._image_size, self._device = source, image_size, device
        self._stream = torch.cuda.Stream(device)
        self._pipeline = Pipeline(max_batch_size, threads, device.index, prefetch_queue_depth=2)
        with self._pipeline:
            encoded, start, shape, flip = fn.external_source(self._feed, num_outputs=4)
            windows = _decode_window(encoded, start, shape, "mixed")
            images = fn.resize(windows, size=image_size, interp_type=types.INTERP_CUBIC, antialias=True)
            self._pipeline.set_outputs(fn.transpose(fn.flip(images, horizontal=flip), perm=[2, 0, 1]))
        self._pipeline.build()

    def _feed(self, iteration: int) -> tuple:
        batch = self._source(iteration)
        windows = batch.windows
        return batch.encoded, windows[:, :2].copy(), windows[:, 2:].copy(), batch.flips.astype(np.int32)

    def run(self) -> UInt8[Tensor, "b 3 h w"]:
        """Images of the next iteration. RuntimeError when one cannot be decoded: the decoder is then of no use."""
        (decoded,) = self._pipeline.run()
        with torch.cuda.stream(self._stream):
            images = torch.empty((len(decoded), 3, *self._image_size), dtype=torch.uint8, device=self._device)
            feed_ndarray(decoded.as_tensor(), images, cuda_stream=self._stream)
        # Done before DALI reuses `decoded`; on a stream of its own, since training's has whole steps queued.
        self._stream.synchronize()
        images.record_stream(torch.cuda.default_stream(self._device))  # where training reads and frees them
        return images  # (B, 3, H, W)


DECODERS: dict[str, type[CpuDecoder] | type[GpuDecoder]] = {"cpu": CpuDecoder, "cuda": GpuDecoder}


def _decode_window(encoded, start, shape, device: str):  # type: ignore[no-untyped-def]  # DALI's nodes have no types
    """DALI node: the window of each image, HWC, RGB."""
    return fn.decoders.image_slice(
        encoded,
        start=start,
        shape=shape,
        axis_names="WH",
        device=device,
        output_type=types.RGB,
        adjust_orientation=False,
    )
