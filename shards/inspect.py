"""One image's bytes: what they are by content, and whether every later stage can take them.

Names lie (ImageNet holds a PNG named .JPEG), headers too, so an image is decoded in full before it enters a shard. What
DALI 2.4 cannot take, GIF, text, empty and cut files, would take the training process down with it.
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
"""What DALI decodes, by PIL's name of the format; MPO is a phone's JPEG with more pictures behind it."""
MAX_PIXELS, MAX_BYTES = 2**26, 2**27
"""Beyond, an image does not enter: decoding it would take more memory than a worker has."""


class Unfit(Exception):
    """Why an image cannot enter a shard."""


@dataclass(frozen=True)
class ImageInfo:
    extension: str
    width: int
    height: int
    """Pixels as stored: DALI, torchvision and PIL ignore the EXIF orientation alike."""


def inspect(data: bytes) -> ImageInfo:
    """Decodes `data` in full; raises `Unfit` with the reason when that fails or DALI could not take it.

    Of a JPEG every coded bit is decoded, which is where damage shows; pixels, a step that cannot fail, are made at an
    eighth of the size. Where libjpeg has as much as a warning, PIL's decode at full size has the say.
    """
    if (size := jpeg_size(data)) is not None and size[0] * size[1] <= MAX_PIXELS and not refusal(data, *size):
        with contextlib.suppress(ValueError):  # a warning of libjpeg's, or colours that it does not convert
            simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
            return ImageInfo("jpg", *size)
    return decoded(data)[1]


def decoded(data: bytes) -> tuple[Image.Image, ImageInfo]:
    """As `inspect`, by PIL at full size, with the picture."""
    if len(data) > MAX_BYTES:
        raise Unfit(f"more than {MAX_BYTES // 2**20} MiB")
    if not data:
        raise Unfit("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF, of which ImageNet has some: nobody looks at it
            with Image.open(io.BytesIO(data)) as image:
                if image.format not in EXTENSIONS:
                    raise Unfit(f"a {image.format} file, which the decoder does not take")
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise Unfit(f"{width} x {height} pixels, more than {MAX_PIXELS:,}: a decompression bomb?")
                image.load()
                extension = EXTENSIONS[image.format]
    except UnidentifiedImageError:
        raise Unfit("not an image") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise Unfit(" ".join(f"cannot be decoded: {error}".split())) from None
    # The loader makes the same check of every sample, so what it would reject must not enter.
    if reason := refusal(data, width, height):
        raise Unfit(reason)
    return image, ImageInfo(extension, width, height)


def shrunk(image: Image.Image, short_side: int, quality: int) -> tuple[bytes, ImageInfo]:
    """`image` as a JPEG whose short side has `short_side` pixels (bicubic, antialias)."""
    scale = short_side / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    if image.mode.startswith("I"):  # 16 bits: PIL's own conversion would turn all above 255 white
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    picture = image if image.mode == "L" else image.convert("RGB")
    file = io.BytesIO()
    # PIL's bicubic has antialias. The EXIF orientation is left out: no stage looks at it.
    picture.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return file.getvalue(), ImageInfo("jpg", *size)


def refusal(data: bytes | memoryview, width: int, height: int) -> str | None:
    """Why these bytes must not reach DALI as an image of `width` x `height` pixels, or None.

    DALI 2.4 takes the process down with it on an empty, header-only, text or GIF sample, and on a JPEG whose header
    cannot be parsed between sound markers (batch of 60), so header and end are read first. Damage behind the header
    raises, or decodes to garbage that only a checksum detects.
    """
    head = bytes(data[:32]).ljust(32, b"\0")
    if head[:2] == b"\xff\xd8":
        if jpeg_size(data) != (width, height):
            return f"JPEG without a sound header of {width} x {height} pixels"
        # at the very end of most; some have kilobytes of something else behind
        ends = bytes(data[-64:]).find(b"\xff\xd9") >= 0 or bytes(data[2:]).find(b"\xff\xd9") >= 0
        return None if ends else "JPEG without an end marker"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        if struct.unpack_from(">4sII", head, 12) != (b"IHDR", width, height):
            return f"PNG without a sound header of {width} x {height} pixels"
        return None if b"IEND" in bytes(data[-65536:]) else "PNG without an IEND chunk"
    if head[:4] == b"RIFF" and head[8:15] == b"WEBPVP8":
        return None if len(data) >= int.from_bytes(head[4:8], "little") + 8 else "WebP shorter than its header says"
    if head[:2] == b"BM":
        if struct.unpack_from("<ii", head, 18) not in ((width, height), (width, -height)):
            return f"BMP without a sound header of {width} x {height} pixels"
        return None if len(data) >= int.from_bytes(head[2:6], "little") else "BMP shorter than its header says"
    return "not a JPEG, PNG, WebP or BMP" if len(data) else "empty"


def jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """Width and height of the frame header, when every segment up to the first scan is in its place (ITU T.81, B.1)."""
    size, place = None, 2 if data[:2] == b"\xff\xd8" else len(data)
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if marker == 0xDA:  # the scan begins
            return size
        if marker in _JPEG_FRAMES and place + 9 <= len(data):
            size = (data[place + 7] << 8 | data[place + 8], data[place + 5] << 8 | data[place + 6])
        place += 2 + max(2, data[place + 2] << 8 | data[place + 3])
    return None


_JPEG_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15; the three are tables
