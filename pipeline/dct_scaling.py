"""Decoding a JPEG at a half, a quarter or an eighth of its size, if that still covers the requested crop.

libjpeg-turbo produces fewer pixels with a smaller inverse DCT, instead of all pixels that the resize then averages.
The pixels differ: the DCT's average is not the resize's, and a window's edges are rounded to whole pixels of the small
image. docs/measured/pipeline.md has the costs and gains.
"""

import numpy as np
import simplejpeg
from jaxtyping import Float64, Int32, UInt8

STUB = np.frombuffer(simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8)), np.uint8)
"""A tiny JPEG that DALI decodes instead of one that this module decodes."""


def reduction(data: UInt8[np.ndarray, "size"], window: Int32[np.ndarray, "4"], resize: Float64[np.ndarray, "4"]) -> int:
    """How many times smaller an image can be decoded: 1, 2, 4 or 8.

    The reduced window is never smaller than the size to which it will be resized. `window` and `resize` are rows of
    `EncodedBatch` (`pipeline/decode.py`). 1 for files that are not JPEGs in YCbCr or gray.
    """
    (_, _, width, height), (new_height, new_width, _, _) = window.tolist(), resize.tolist()
    smaller = min(width / new_width, height / new_height)
    if smaller < 2 or data[:2].tobytes() != b"\xff\xd8":
        return 1
    try:
        _, _, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # DALI decodes it, and reports what is wrong
        return 1
    return (8 if smaller >= 8 else 4 if smaller >= 4 else 2) if colours in ("YCbCr", "Gray") else 1


def decode_reduced_window(
    data: UInt8[np.ndarray, "size"], window: Int32[np.ndarray, "4"], times: int
) -> UInt8[np.ndarray, "h w 3"]:
    """The window, RGB, of the image decoded `times` smaller.

    Raises:
        RuntimeError: the file is damaged; DALI raises the same type.
    """
    left, top, width, height = window.tolist()
    try:
        rows, columns, *_ = simplejpeg.decode_jpeg_header(data)
        least = {"min_height": -(-rows // times), "min_width": -(-columns // times)}
        image = simplejpeg.decode_jpeg(data, "RGB", **least, strict=False)
    except ValueError as error:
        raise RuntimeError(f"libjpeg-turbo: {error}") from None
    top, bottom, left, right = (round(edge / times) for edge in (top, top + height, left, left + width))
    return image[top:bottom, left:right]
