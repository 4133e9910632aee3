"""Checks an image's bytes: their format by content, and whether every later stage can decode them.

File names and headers can be wrong (ImageNet has a PNG named .JPEG), so an image is decoded in full before it is
packed. GIF, text, empty and truncated files crash DALI 2.4, and with it the training process.
"""

import contextlib
import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}
"""Extension of each format that DALI decodes, by its name in PIL. MPO is a phone's JPEG with more images after it."""
MAX_PIXELS, MAX_BYTES = 2**26, 2**27
"""Larger images are unusable: decoding them would take more memory than a worker has."""


class UnusableImageError(Exception):
    """An image cannot be packed; the message is the reason."""


@dataclass(frozen=True)
class ImageInfo:
    """Extension and size of an image."""

    extension: str
    width: int
    height: int
    """Pixels as stored: DALI, torchvision and PIL all ignore the EXIF orientation."""


def inspect(data: bytes) -> ImageInfo:
    """Decodes `data` in full and returns its format and size.

    For a JPEG every coded bit is decoded, because damage shows there; pixels are computed at an eighth of the size,
    because that step cannot fail. If libjpeg gives any warning, PIL's decode at full size decides.

    Raises:
        UnusableImageError: decoding fails, or DALI could not decode the image.
    """
    if (
        (size := jpeg_size(data)) is not None
        and size[0] * size[1] <= MAX_PIXELS
        and not undecodable_reason(data, *size)
    ):
        with contextlib.suppress(ValueError):  # a warning of libjpeg, or colours that it does not convert
            simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
            return ImageInfo("jpg", *size)
    return decode_with_pil(data)[1]


def decode_with_pil(data: bytes) -> tuple[Image.Image, ImageInfo]:
    """As `inspect`, but decodes with PIL at full size and also returns the image."""
    if len(data) > MAX_BYTES:
        raise UnusableImageError(f"more than {MAX_BYTES // 2**20} MiB")
    if not data:
        raise UnusableImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged EXIF, as in some ImageNet files; EXIF is not used
            with Image.open(io.BytesIO(data)) as image:
                if image.format not in EXTENSIONS:
                    raise UnusableImageError(f"a {image.format} file, which DALI does not decode")
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise UnusableImageError(
                        f"{width} x {height} pixels, more than {MAX_PIXELS:,}: a decompression bomb?"
                    )
                image.load()
                extension = EXTENSIONS[image.format]
    except UnidentifiedImageError:
        raise UnusableImageError("not an image") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UnusableImageError(" ".join(f"cannot be decoded: {error}".split())) from None
    # The loader makes the same check on every sample, so an image that it would reject must not be packed.
    if reason := undecodable_reason(data, width, height):
        raise UnusableImageError(reason)
    return image, ImageInfo(extension, width, height)


def resize_to_jpeg(image: Image.Image, short_side: int, quality: int) -> tuple[bytes, ImageInfo]:
    """`image` as a JPEG whose short side has `short_side` pixels (bicubic, antialias)."""
    scale = short_side / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    if image.mode.startswith("I"):  # 16 bits: PIL's own conversion would turn everything above 255 white
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    converted = image if image.mode == "L" else image.convert("RGB")
    file = io.BytesIO()
    # PIL's bicubic is antialiased. The EXIF orientation is not written, because no stage uses it.
    converted.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return file.getvalue(), ImageInfo("jpg", *size)


def undecodable_reason(data: bytes | memoryview, width: int, height: int) -> str | None:
    """Why these bytes must not reach DALI as an image of `width` x `height` pixels, or None.

    DALI 2.4 crashes the process on an empty, header-only, text or GIF sample, and on a JPEG whose header cannot be
    parsed between intact markers (batch of 60). So header and end are checked first. Damage after the header raises an
    error in DALI, or decodes to garbage that only a checksum detects.
    """
    head = bytes(data[:32]).ljust(32, b"\0")
    if head[:2] == b"\xff\xd8":
        if jpeg_size(data) != (width, height):
            return f"JPEG without an intact header of {width} x {height} pixels"
        # Most files end with the marker; some have kilobytes of other data after it.
        ends = bytes(data[-64:]).find(b"\xff\xd9") >= 0 or bytes(data[2:]).find(b"\xff\xd9") >= 0
        return None if ends else "JPEG without an end marker"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        if struct.unpack_from(">4sII", head, 12) != (b"IHDR", width, height):
            return f"PNG without an intact header of {width} x {height} pixels"
        return None if b"IEND" in bytes(data[-65536:]) else "PNG without an IEND chunk"
    if head[:4] == b"RIFF" and head[8:15] == b"WEBPVP8":
        return None if len(data) >= int.from_bytes(head[4:8], "little") + 8 else "WebP shorter than its header says"
    if head[:2] == b"BM":
        if struct.unpack_from("<ii", head, 18) not in ((width, height), (width, -height)):
            return f"BMP without an intact header of {width} x {height} pixels"
        return None if len(data) >= int.from_bytes(head[2:6], "little") else "BMP shorter than its header says"
    return "not a JPEG, PNG, WebP or BMP" if len(data) else "empty"


def jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """Width and height from the frame header; None if the segments up to the first scan are damaged (ITU T.81, B.1)."""
    size, offset = None, 2 if data[:2] == b"\xff\xd8" else len(data)
    while offset + 4 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker == 0xFF:  # a fill byte
            offset += 1
            continue
        if marker == 0xDA:  # the scan begins
            return size
        if marker in _JPEG_FRAMES and offset + 9 <= len(data):
            size = (data[offset + 7] << 8 | data[offset + 8], data[offset + 5] << 8 | data[offset + 6])
        offset += 2 + max(2, data[offset + 2] << 8 | data[offset + 3])
    return None


_JPEG_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15; these three are no frames: DHT, JPG, DAC
