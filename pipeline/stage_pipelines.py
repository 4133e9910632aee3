"""The two halves of a decoder, each alone at its limit: windows decoded, and windows resized, flipped and changed.

On the CPU they are the decoder's own two calls. On the GPU one DALI graph does both; here each half has a graph of its
own, made of the same nodes.
"""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn

from maelstream.pipeline.decode import (
    CpuDecoder,
    DecodeConfig,
    Decoded,
    EncodedBatch,
    dali_inputs,
    decoded_windows,
    resized,
)

Run = Callable[[], object]
"""Does one batch after the other."""


def decode_alone(
    batches: list[EncodedBatch],
    image_size: tuple[int, int],
    threads: int,
    device: torch.device,
    config: DecodeConfig,
) -> Run:
    """Decodes the windows of `batches`, in turn, without end."""
    largest = max(len(batch.encoded) for batch in batches)
    if device.type == "cpu":
        return CpuDecoder(_in_turn(batches), largest, image_size, threads, device, config=config).decode
    inputs = [dali_inputs(batch)[:3] for batch in batches]
    pipeline = Pipeline(largest, threads, device.index, prefetch_queue_depth=2)
    with pipeline:
        encoded, start, shape = fn.external_source(_in_turn(inputs), num_outputs=3)
        pipeline.set_outputs(decoded_windows(encoded, start, shape, "mixed", config.form, **config.of_gpu()))
    pipeline.build()
    return pipeline.run


def augment_alone(
    batches: list[EncodedBatch],
    image_size: tuple[int, int],
    threads: int,
    device: torch.device,
    config: DecodeConfig,
) -> tuple[Run, float]:
    """Makes images of the windows of `batches`, in turn, without end; and the mean bytes of a window.

    On a GPU without the changes after the flip (`maelstream.pipeline.pixel_augment`), which no graph makes.
    """
    largest = max(len(batch.encoded) for batch in batches)
    config = config if device.type == "cpu" else DecodeConfig()
    decoder = CpuDecoder(_in_turn(batches), largest, image_size, threads, torch.device("cpu"), config=config)
    held = [_held(decoder.decode()) for _ in batches]
    size = float(np.mean([window.nbytes for decoded in held for window in decoded.windows]))
    if device.type == "cpu":
        turn = cycle(held)
        return lambda: decoder.augment(next(turn)), size
    windows = [[torch.from_numpy(window).to(device) for window in decoded.windows] for decoded in held]
    inputs = [dali_inputs(batch)[3:] for batch in batches]
    pipeline = Pipeline(largest, threads, device.index, prefetch_queue_depth=2)
    with pipeline:
        images = fn.external_source(_in_turn(windows), device="gpu", layout="HWC")
        sizes, crops, flips = fn.external_source(_in_turn(inputs), num_outputs=3)
        pipeline.set_outputs(resized(images, sizes, crops, flips, image_size))
    pipeline.build()
    return pipeline.run, size


def _in_turn(items: list) -> Callable[[int], Any]:
    return lambda number: items[number % len(items)]


def _held(decoded: Decoded) -> Decoded:
    """In memory of its own: DALI uses its buffers again."""
    return decoded._replace(windows=[np.array(decoded.windows[number]) for number in range(len(decoded.windows))])
