"""An image is accepted if it is sound, and if DALI decodes it to PIL's picture."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from maelstream.shards.dali_proof import DaliDecodeError, check_dali_decodes
from maelstream.shards.inspect import (
    MAX_PIXELS,
    Conversion,
    ImageInfo,
    UnsupportedImageError,
    UnusableImageError,
    convert,
    decode_with_pil,
    inspect,
    with_8_bits,
)
from tests.conftest import encoded, photograph
from tests.helpers.odd_images import bmp_with_16_bits, lossless_jpeg

JPEG = encoded(photograph(), "JPEG").tobytes()
PNG = encoded(photograph(), "PNG").tobytes()
WEBP = encoded(photograph(), "WEBP").tobytes()
BMP = encoded(photograph(), "BMP").tobytes()
GIF = encoded(photograph(), "GIF").tobytes()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello, world", "not an image"),
        (GIF, "a GIF file, which DALI does not decode"),
        (JPEG[:100], "cannot be decoded"),
        (JPEG[:2] + bytes(300) + JPEG[302:], "not an image|cannot be decoded"),
        (PNG[:10] + bytes(20) + PNG[30:], "not an image|cannot be decoded"),
        (BMP[:10] + bytes(20) + BMP[30:], "not an image|cannot be decoded"),
        (JPEG[:-2000], "cannot be decoded: image file is truncated"),
        (PNG[: len(PNG) // 2], "cannot be decoded: image file is truncated"),
        (WEBP[:-100], "cannot be decoded"),
        (BMP[:-1000], "cannot be decoded: image file is truncated"),
        (lossless_jpeg(64, 64), "a lossless JPEG .SOF3., which DALI does not decode"),
        (lossless_jpeg(512, 512), "a lossless JPEG .SOF3., which DALI does not decode"),
        (JPEG.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc5\x00\x11\x08"), "a hierarchical JPEG .SOF5."),
        (JPEG.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c"), "a JPEG of 12 bits per channel"),
    ],
)
def test_files_that_are_not_sound_are_rejected_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnusableImageError, match=reason):
        inspect(data)


@pytest.mark.parametrize("data", [JPEG, PNG, WEBP, BMP, JPEG + b"trailing bytes", PNG + b"trailing bytes"])
def test_sound_files_are_accepted(data: bytes) -> None:
    info = inspect(data)
    assert (info.width, info.height) == (300, 200)


def test_every_imagenet_file_is_accepted(imagenet_sample: Path) -> None:
    for path in imagenet_sample.glob("*/*"):
        data = path.read_bytes()
        info = inspect(data)
        assert (info.width, info.height) == Image.open(io.BytesIO(data)).size


def test_a_multi_picture_file_of_a_phone_is_read_as_its_first_jpeg() -> None:
    data = encoded(photograph(), "MPO", save_all=True, append_images=[photograph(seed=1)]).tobytes()
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert inspect(data) == ImageInfo("jpg", 300, 200)


def png_with_wrong_idat_checksum() -> bytes:
    position = PNG.index(b"IDAT") + 4 + int.from_bytes(PNG[PNG.index(b"IDAT") - 4 : PNG.index(b"IDAT")], "big")
    return PNG[:position] + bytes(byte ^ 255 for byte in PNG[position : position + 4]) + PNG[position + 4 :]


def apng_whose_default_image_is_another() -> bytes:
    file = io.BytesIO()
    photograph().save(file, "PNG", save_all=True, default_image=True, append_images=[photograph(seed=1)] * 2)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(bmp_with_16_bits(photograph(), (5, 5, 5)), "DALI cannot decode it", id="BMP 555"),
        pytest.param(png_with_wrong_idat_checksum(), "DALI cannot decode it", id="PNG with a wrong checksum"),
        pytest.param(JPEG[:2] + b"\xff\x00" + JPEG[2:], "DALI cannot decode it", id="FF 00 in a JPEG's header"),
        pytest.param(apng_whose_default_image_is_another(), "an animated PNG", id="APNG"),
    ],
)
def test_what_pil_decodes_and_dali_does_not_is_rejected_or_stored_as_png(data: bytes, reason: str) -> None:
    """Version 0.1.0 packed each of these; they stopped runs, or gave them another picture."""
    with pytest.raises(UnsupportedImageError, match=reason):
        inspect(data)
    stored, info = convert(data, Conversion(reencode=True))
    picture = with_8_bits(decode_with_pil(data))
    assert info.extension == "png" and (np.asarray(Image.open(io.BytesIO(stored))) == np.asarray(picture)).all()
    assert inspect(stored) == info


def test_reencoding_stores_gif_and_tiff_without_loss_and_keeps_what_needs_none() -> None:
    for form in ("GIF", "TIFF"):
        data = encoded(photograph(), form).tobytes()
        stored, info = convert(data, Conversion(reencode=True))
        assert info == ImageInfo("png", 300, 200)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert (np.asarray(Image.open(io.BytesIO(stored))) == expected).all()
    assert convert(JPEG, Conversion(reencode=True)) == (JPEG, ImageInfo("jpg", 300, 200))
    with pytest.raises(UnusableImageError, match="not an image"):
        convert(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", Conversion(reencode=True))


def test_resizing_makes_a_picture_usable_that_dali_does_not_decode() -> None:
    data = bmp_with_16_bits(photograph(), (5, 5, 5))
    stored, info = convert(data, Conversion(resize=100))
    assert info == ImageInfo("jpg", 150, 100) and inspect(stored) == info
    with pytest.raises(UnsupportedImageError):
        convert(data, Conversion(resize=200))  # not larger, so it would keep its bytes


@pytest.mark.parametrize("kind", ["text", "compressed text", "ICC profile"])
def test_a_sound_png_with_a_large_chunk_beside_the_picture_is_accepted(kind: str) -> None:
    """PIL raises on a chunk that decompresses to more than 1 MiB (`ztxt.png`)."""
    text, info = "x" * (2 * 2**20), PngImagePlugin.PngInfo()
    options: dict = {}
    if kind == "ICC profile":
        options["icc_profile"] = np.random.default_rng(0).bytes(2 * 2**20)
    else:
        info.add_text("comment", text, zip=kind == "compressed text")
    data = encoded(photograph(), "PNG", pnginfo=info, **options).tobytes()
    assert inspect(data) == ImageInfo("png", 300, 200)


def test_any_exception_of_a_decoder_makes_the_image_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise NotImplementedError("a form that nobody has implemented")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(UnusableImageError, match="cannot be decoded: a form that nobody has implemented"):
        decode_with_pil(PNG)


def test_more_pixels_than_a_worker_has_memory_for_are_rejected() -> None:
    row = zlib.compress(bytes(1))
    header = struct.pack(">IIBBBBB", MAX_PIXELS + 1, 1, 8, 0, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    with pytest.raises(UnusableImageError, match="decompression bomb"):
        inspect(data)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 4}])
def test_damaged_jpegs_are_accepted_if_and_only_if_pil_and_dali_decode_them(options: dict) -> None:
    """Flips, zeroes or removes bytes at 150 positions of each kind of JPEG."""
    check_damaged(encoded(photograph(), "JPEG", **options), 150)


@pytest.mark.parametrize(
    ("mode", "form"), [("RGB", "PNG"), ("L", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("RGB", "WEBP"), ("RGB", "BMP")]
)
def test_other_damaged_files_are_accepted_if_and_only_if_pil_and_dali_decode_them(mode: str, form: str) -> None:
    check_damaged(encoded(photograph(120, 90).convert(mode), form), 90)


def check_damaged(whole: np.ndarray, count: int) -> None:
    random, accepted = np.random.default_rng(0), 0
    for number in range(count):
        damaged, position = whole.copy(), int(random.integers(2, len(whole) - 2))
        if number % 3 == 0:
            damaged[position] ^= 1 << int(random.integers(8))
        elif number % 3 == 1:
            damaged[position : position + 40] = 0
        else:
            damaged = np.concatenate([whole[:position], whole[-2:]])
        data = damaged.tobytes()
        assert accepts(inspect, data) == accepts(decode_with_both, data)
        accepted += accepts(inspect, data)
    assert accepted < count


def decode_with_both(data: bytes) -> None:
    check_dali_decodes(data, np.asarray(with_8_bits(decode_with_pil(data)).convert("RGB")))


def accepts(function: object, data: bytes) -> bool:
    try:
        function(data)  # type: ignore[operator]
    except (UnusableImageError, DaliDecodeError):
        return False
    return True
