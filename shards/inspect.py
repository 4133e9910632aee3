"""One image's bytes: what they are by content, and whether every later stage can take them.

Names lie (ImageNet holds a PNG named .JPEG), headers too, so an image is decoded in full before it enters a shard. What
DALI 2.4 cannot take, GIF, text, empty and cut files, would take the training process down with it.
"""

import io
import warnings
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}
"""What DALI decodes on the CPU and the GPU, by PIL's name of the format."""
MAX_PIXELS = 2**28
"""A decompression bomb's bound: 268 megapixels, 0.8 GB decoded."""


class Unfit(Exception):
    """Why an image cannot enter a shard."""


@dataclass(frozen=True)
class ImageInfo:
    extension: str
    width: int
    height: int
    """Pixels as stored: DALI, torchvision and PIL ignore the EXIF orientation alike."""


def inspect(data: bytes) -> ImageInfo:
    """Decodes `data` in full; raises `Unfit` with the reason when that fails or DALI could not take it."""
    if not data:
        raise Unfit("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PIL warns of bombs and of damaged files that it decodes half
            with Image.open(io.BytesIO(data)) as image:
                if image.format not in EXTENSIONS:
                    raise Unfit(f"a {image.format} file, which the decoder does not take")
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise Unfit(f"{width} x {height} pixels, over the bound of {MAX_PIXELS}")
                image.load()
                return ImageInfo(EXTENSIONS[image.format], width, height)
    except UnidentifiedImageError:
        raise Unfit("not an image") from None
    except (OSError, SyntaxError, ValueError, EOFError, Warning, Image.DecompressionBombError) as error:
        raise Unfit(" ".join(f"cannot be decoded: {error}".split())) from None
