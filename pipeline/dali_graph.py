"""DALI nodes that decode, resize, crop and flip images; the pipelines are built of them.

Only the crop window is decoded (`image_slice`), or with form="full" the whole image. The EXIF orientation is ignored,
as torchvision and PIL do. DALI's nodes have no types.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from nvidia.dali import fn, types


def resized_windows(  # type: ignore[no-untyped-def]
    feed: Callable[[int], tuple], image_size: tuple[int, int], device: str, form: str, **options: Any
):
    """Images of `image_size`, HWC, decoded on "mixed" (the GPU) or "cpu".

    `feed` returns `dali_inputs` (`pipeline/decode.py`) of the batch of an iteration; `options` are the decoder's.
    """
    encoded, start, shape, size, crop, flip = fn.external_source(feed, num_outputs=6)
    windows = decoded_windows(encoded, start, shape, device, form, **options)
    return resized(windows, size, crop, flip, image_size)


def decoded_windows(encoded, start, shape, device: str, form: str, **options: Any):  # type: ignore[no-untyped-def]
    """The crop window of each image, HWC, RGB; `form` as in `DecodeConfig`."""
    if form == "window":
        return fn.decoders.image_slice(
            encoded,
            start=start,
            shape=shape,
            axis_names="WH",
            device=device,
            output_type=types.RGB,
            adjust_orientation=False,
            **options,
        )
    images = fn.decoders.image(encoded, device=device, output_type=types.RGB, adjust_orientation=False, **options)
    return fn.slice(images, start=start, shape=shape, axis_names="WH")


def resized(windows, size, crop, flip, image_size: tuple[int, int]):  # type: ignore[no-untyped-def]
    """Windows resized to `size`, cropped to `image_size` from `crop` and flipped.

    Only the crop is computed. The filter also reads the pixels around it, so the result is that of a whole resize.
    """
    extent = types.Constant(np.array(image_size, np.float32))
    images = fn.resize(
        windows,
        size=list(image_size),
        roi_start=crop / size,
        roi_end=(crop + extent) / size,
        roi_relative=True,
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )
    return fn.flip(images, horizontal=flip)
