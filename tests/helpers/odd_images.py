"""Image files that PIL cannot write."""

import struct

import numpy as np
from PIL import Image


def lossless_jpeg(width: int, height: int) -> bytes:
    """A sound lossless JPEG (SOF3): 8 bits, gray, every pixel equal to its predicted value (ITU T.81, annex H)."""

    def segment(marker: int, body: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body

    # One Huffman code: a bit 0 for the difference 0.
    table = segment(0xC4, bytes([0, 1]) + bytes(15) + bytes([0]))
    frame = segment(0xC3, struct.pack(">BHHB", 8, height, width, 1) + bytes([1, 0x11, 0]))
    scan = segment(0xDA, bytes([1, 1, 0, 1, 0, 0]))
    bits = width * height
    coded = bytes(bits // 8) + (bytes([0xFF >> bits % 8]) if bits % 8 else b"")
    return b"\xff\xd8" + table + frame + scan + coded + b"\xff\xd9"


def bmp_with_16_bits(image: Image.Image, bits: tuple[int, int, int]) -> bytes:
    """A BMP of 16 bits per pixel, with `bits` for red, green and blue: (5, 5, 5) or (5, 6, 5)."""
    pixels = np.asarray(image.convert("RGB")).astype(np.uint16)[::-1]  # from the lowest row to the highest
    red, green, blue = bits
    packed = (pixels[..., 0] >> 8 - red) << green + blue | (pixels[..., 1] >> 8 - green) << blue
    packed |= pixels[..., 2] >> 8 - blue
    rows = np.pad(packed, ((0, 0), (0, packed.shape[1] % 2))).astype("<u2").tobytes()
    masks = b"" if bits == (5, 5, 5) else struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    start = 14 + 40 + len(masks)
    header = struct.pack("<2sIHHI", b"BM", start + len(rows), 0, 0, start)
    info = struct.pack("<IiiHHIIiiII", 40, *image.size, 1, 16, 3 if masks else 0, len(rows), 0, 0, 0, 0)
    return header + info + masks + rows
