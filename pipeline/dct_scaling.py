"""Decoding a JPEG at a half, a quarter or an eighth of its size, where that still covers what is wanted.

libjpeg-turbo makes so many fewer pixels by a smaller inverse DCT, instead of making them all for the resize to average.
The result is another picture: the DCT's average is not the resize's, and a window's edges fall on whole pixels of the
small picture. What that costs and brings: docs/measured/pipeline.md.
"""

import numpy as np
import simplejpeg
from jaxtyping import Int32, UInt8

STUB = np.frombuffer(simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8)), np.uint8)
"""A JPEG to decode in the place of one that is decoded here."""


def reduction(data: UInt8[np.ndarray, "size"], window: Int32[np.ndarray, "4"], resize: Int32[np.ndarray, "4"]) -> int:
    """How many times smaller, 1, 2, 4 or 8, an image may be decoded so that its window is no smaller than it will be
    made; `window` and `resize` as in `maelstream.pipeline.decode.EncodedBatch`. 1 for what is no JPEG of the usual colours."""
    (_, _, width, height), (new_height, new_width, _, _) = window.tolist(), resize.tolist()
    smaller = min(width / new_width, height / new_height)
    if smaller < 2 or data[:2].tobytes() != b"\xff\xd8":
        return 1
    try:
        _, _, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # for DALI to say
        return 1
    return (8 if smaller >= 8 else 4 if smaller >= 4 else 2) if colours in ("YCbCr", "Gray") else 1


def window_of_scaled(
    data: UInt8[np.ndarray, "size"], window: Int32[np.ndarray, "4"], times: int
) -> UInt8[np.ndarray, "h w 3"]:
    """The window, RGB, of the image decoded `times` smaller. RuntimeError for a damaged file, as DALI has it."""
    left, top, width, height = window.tolist()
    try:
        rows, columns, *_ = simplejpeg.decode_jpeg_header(data)
        least = {"min_height": -(-rows // times), "min_width": -(-columns // times)}
        image = simplejpeg.decode_jpeg(data, "RGB", **least, strict=False)
    except ValueError as error:
        raise RuntimeError(f"libjpeg-turbo: {error}") from None
    top, bottom, left, right = (round(edge / times) for edge in (top, top + height, left, left + width))
    return image[top:bottom, left:right]
