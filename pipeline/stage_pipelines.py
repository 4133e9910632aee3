"""The two halves of a decoder, each on its own, for timing: decoding windows, and augmenting decoded windows.

On the CPU these are the decoder's own two calls. On the GPU one DALI graph does both; here each half gets its own graph
of the same nodes.
"""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn

from maelstream.pipeline.config import DecodeConfig
from maelstream.pipeline.dali_graph import decoded_windows, resized
from maelstream.pipeline.decode import CpuDecoder, Decoded, EncodedBatch, dali_inputs

RunBatch = Callable[[], object]
"""Processes the next batch."""


def decode_only(
    batches: list[EncodedBatch],
    image_size: tuple[int, int],
    threads: int,
    device: torch.device,
    config: DecodeConfig,
) -> RunBatch:
    """A function that decodes the windows of the next of `batches`, without end."""
    largest = max(len(batch.encoded) for batch in batches)
    if device.type == "cpu":
        return CpuDecoder(_cycle(batches), largest, image_size, threads, device, config=config).decode
    inputs = [dali_inputs(batch)[:3] for batch in batches]
    pipeline = Pipeline(largest, threads, device.index, prefetch_queue_depth=2)
    with pipeline:
        encoded, start, shape = fn.external_source(_cycle(inputs), num_outputs=3)
        pipeline.set_outputs(decoded_windows(encoded, start, shape, "mixed", config.form, **config.dali_gpu_options()))
    pipeline.build()
    return pipeline.run


def augment_only(
    batches: list[EncodedBatch],
    image_size: tuple[int, int],
    threads: int,
    device: torch.device,
    config: DecodeConfig,
) -> tuple[RunBatch, float]:
    """A function that augments the windows of the next of `batches`, without end; and the mean bytes per window.

    On a GPU it leaves out pixel augmentation (`pipeline/pixel_augment.py`), which is not part of the DALI graph.
    """
    largest = max(len(batch.encoded) for batch in batches)
    config = config if device.type == "cpu" else DecodeConfig()
    decoder = CpuDecoder(_cycle(batches), largest, image_size, threads, torch.device("cpu"), config=config)
    copies = [_copied(decoder.decode()) for _ in batches]
    size = float(np.mean([window.nbytes for decoded in copies for window in decoded.windows]))
    if device.type == "cpu":
        batches_in_turn = cycle(copies)
        return lambda: decoder.augment(next(batches_in_turn)), size
    windows = [[torch.from_numpy(window).to(device) for window in decoded.windows] for decoded in copies]
    inputs = [dali_inputs(batch)[3:] for batch in batches]
    pipeline = Pipeline(largest, threads, device.index, prefetch_queue_depth=2)
    with pipeline:
        images = fn.external_source(_cycle(windows), device="gpu", layout="HWC")
        sizes, crops, flips = fn.external_source(_cycle(inputs), num_outputs=3)
        pipeline.set_outputs(resized(images, sizes, crops, flips, image_size))
    pipeline.build()
    return pipeline.run, size


def _cycle(items: list) -> Callable[[int], Any]:
    return lambda number: items[number % len(items)]


def _copied(decoded: Decoded) -> Decoded:
    """A copy in separate memory, because DALI reuses its buffers."""
    return decoded._replace(windows=[np.array(decoded.windows[number]) for number in range(len(decoded.windows))])
