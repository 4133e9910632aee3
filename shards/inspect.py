"""Checks an image's bytes: their format by content, and whether every later stage decodes them to PIL's picture.

File names and headers can be wrong (ImageNet has a PNG named .JPEG), so an image is decoded in full before it is
packed. One image that makes DALI raise can end the training process, so nothing is packed that DALI does not decode:
files of a proven form (`shards/forms.py`) need no test, and all others are decoded with DALI here.
"""

import contextlib
import io
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from maelstream.shards.dali_proof import DaliDecodeError, check_dali_decodes
from maelstream.shards.forms import is_animated_png, is_proven_jpeg, is_proven_png, jpeg_frame, png_header, without_text

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}
"""Extension of each format that DALI decodes, by its name in PIL. MPO is a phone's JPEG with more images after it."""
_REENCODED = ("GIF", "TIFF", "PPM", "JPEG2000", "TGA", "ICO", "DIB", "PCX", "SGI", "AVIF")
"""More formats of PIL that `Conversion.reencode` reads. PIL runs other programs for some of those left out (EPS)."""
MAX_PIXELS, MAX_BYTES = 2**26, 2**27
"""Larger images are unusable: decoding one would take more than 500 MiB."""
_MAX_PIXELS_16_BITS = 2**25


class UnusableImageError(Exception):
    """An image cannot be packed; the message is the reason."""


class UnsupportedImageError(UnusableImageError):
    """PIL decodes an image, but DALI does not, or decodes another picture; re-encoding makes it usable."""


@dataclass(frozen=True)
class ImageInfo:
    """Extension and size of an image."""

    extension: str
    width: int
    height: int
    """Pixels as stored: DALI, torchvision and PIL all ignore the EXIF orientation."""


@dataclass(frozen=True)
class Conversion:
    """How images are changed before they are packed; by default, their bytes are kept."""

    resize: int | None = None
    """Short side in pixels; larger images are shrunk to it and encoded again as JPEG."""
    quality: int = 90
    """JPEG quality of resized images."""
    reencode: bool = False
    """Whether images that PIL decodes and DALI does not are stored as PNG."""


def convert(data: bytes, conversion: Conversion) -> tuple[bytes, ImageInfo]:
    """The bytes to pack for the image `data`, and what they are.

    Raises:
        UnusableImageError: the image cannot be packed.
    """
    resize, quality = conversion.resize, conversion.quality
    try:
        info = inspect(data)
        if resize is None or min(info.width, info.height) <= resize:
            return data, info
        return resize_to_jpeg(decode_with_pil(data), resize, quality)
    except UnsupportedImageError:
        if resize is None and not conversion.reencode:
            raise
        image = decode_with_pil(data, (*EXTENSIONS, *_REENCODED) if conversion.reencode else tuple(EXTENSIONS))
        if resize is not None and min(image.size) > resize:
            return resize_to_jpeg(image, resize, quality)
        if not conversion.reencode:
            raise
    file = io.BytesIO()
    with_8_bits(image).save(file, "PNG")
    return file.getvalue(), ImageInfo("png", *image.size)


def inspect(data: bytes) -> ImageInfo:
    """Decodes `data` in full and returns its format and size.

    For a JPEG of a proven form every coded bit is decoded, because damage shows there; pixels are computed at an eighth
    of the size, because that step cannot fail. If libjpeg gives any warning, PIL and DALI decide.

    Raises:
        UnusableImageError: decoding fails, or DALI does not decode the image to PIL's picture.
    """
    frame = jpeg_frame(data)
    if frame is not None and frame.refusal is not None:
        raise UnusableImageError(frame.refusal)
    if frame is not None and is_proven_jpeg(frame, data) and frame.width * frame.height <= MAX_PIXELS:
        with contextlib.suppress(ValueError):  # a warning of libjpeg, or colours that it does not convert
            simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
            return ImageInfo("jpg", frame.width, frame.height)
    header = png_header(data)
    if header is not None and header.width * header.height <= MAX_PIXELS and is_proven_png(header, data):
        return ImageInfo("png", header.width, header.height)
    image = decode_with_pil(data)
    if is_animated_png(data):
        raise UnsupportedImageError("an animated PNG, on which DALI can crash")
    if header is not None and header.bits == 16 and image.width * image.height > _MAX_PIXELS_16_BITS:
        raise UnsupportedImageError(f"more than {_MAX_PIXELS_16_BITS:,} pixels of 16 bits per channel")
    try:
        check_dali_decodes(data, np.asarray(with_8_bits(image).convert("RGB")))
    except DaliDecodeError as reason:
        raise UnsupportedImageError(str(reason)) from None
    return ImageInfo(EXTENSIONS[str(image.format)], *image.size)


def decode_with_pil(data: bytes, formats: tuple[str, ...] = tuple(EXTENSIONS)) -> Image.Image:
    """The image, or the first of several, decoded by PIL at full size.

    Raises:
        UnusableImageError: PIL cannot decode it; UnsupportedImageError if its format is none of `formats`.
    """
    if len(data) > MAX_BYTES:
        raise UnusableImageError(f"more than {MAX_BYTES // 2**20} MiB")
    if not data:
        raise UnusableImageError("empty file")
    try:
        try:
            return _load_with_pil(data, formats)
        except ValueError as error:
            if "MAX_TEXT" not in str(error):
                raise
            return _load_with_pil(without_text(data), formats)
    except UnusableImageError:
        raise
    except UnidentifiedImageError:
        raise UnusableImageError("not an image") from None
    except Exception as error:  # PIL's decoders raise almost any type on odd files
        raise UnusableImageError(" ".join(f"cannot be decoded: {error or type(error).__name__}".split())) from None


def _load_with_pil(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    known = [name for name in (*EXTENSIONS, *_REENCODED) if name != "MPO"]  # which PIL opens as JPEG
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged EXIF, as in some ImageNet files; EXIF is not used
        with Image.open(io.BytesIO(data), formats=known) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnusableImageError(
                    f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}: a decompression bomb?"
                )
            if image.format not in formats:
                raise UnsupportedImageError(f"a {image.format} file, which DALI does not decode")
            image.load()
            return image


def with_8_bits(image: Image.Image) -> Image.Image:
    """The picture in mode L or RGB, without alpha; 16-bit values are divided by 257, as DALI does.

    Raises:
        UnusableImageError: the image has values that no picture of 8 bits can hold.
    """
    if image.mode.startswith("I") or image.mode == "F":  # PIL's own conversion would turn values above 255 white
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise UnusableImageError(f"pixels of mode {image.mode}, whose scale is unknown")
        return Image.fromarray(np.round(values / 257).astype(np.uint8))
    try:
        return image if image.mode == "L" else image.convert("RGB")
    except Exception as error:  # as in `decode_with_pil`
        raise UnusableImageError(" ".join(f"cannot be converted to RGB: {error}".split())) from None


def resize_to_jpeg(image: Image.Image, short_side: int, quality: int) -> tuple[bytes, ImageInfo]:
    """`image` as a JPEG whose short side has `short_side` pixels (bicubic, antialias)."""
    scale = short_side / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    file = io.BytesIO()
    # PIL's bicubic is antialiased. The EXIF orientation is not written, because no stage uses it.
    with_8_bits(image).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return file.getvalue(), ImageInfo("jpg", *size)
