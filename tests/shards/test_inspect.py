"""A file becomes a sample if its header, its end and a full decode are sound; the loader checks the first two again."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maelstream.shards.inspect import ImageInfo, UnusableImageError, decode_with_pil, inspect, undecodable_reason
from tests.conftest import encoded, photograph

JPEG = encoded(photograph(), "JPEG").tobytes()
PNG = encoded(photograph(), "PNG").tobytes()
WEBP = encoded(photograph(), "WEBP").tobytes()
BMP = encoded(photograph(), "BMP").tobytes()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, world", "not a JPEG, PNG, WebP or BMP"),
        (encoded(photograph(), "GIF").tobytes(), "not a JPEG, PNG, WebP or BMP"),
        (JPEG[:100], "JPEG without an intact header of 300 x 200 pixels"),
        (JPEG[:2] + bytes(300) + JPEG[302:], "JPEG without an intact header of 300 x 200 pixels"),
        (encoded(photograph(301, 200), "JPEG").tobytes(), "JPEG without an intact header of 300 x 200 pixels"),
        (PNG[:10] + bytes(20) + PNG[30:], "PNG without an intact header of 300 x 200 pixels"),
        (BMP[:10] + bytes(20) + BMP[30:], "BMP without an intact header of 300 x 200 pixels"),
        (JPEG[:-20], "JPEG without an end marker"),
        (PNG[: len(PNG) // 2], "PNG without an IEND chunk"),
        (WEBP[:-100], "WebP shorter than its header says"),
        (BMP[:-1], "BMP shorter than its header says"),
    ],
)
def test_files_that_would_crash_dali_are_rejected_before_it_reads_them(data: bytes, reason: str) -> None:
    assert undecodable_reason(data, 300, 200) == reason


@pytest.mark.parametrize("data", [JPEG, PNG, WEBP, BMP, JPEG + b"trailing bytes"])
def test_whole_files_are_accepted(data: bytes) -> None:
    assert undecodable_reason(data, 300, 200) is None


def test_every_imagenet_file_is_accepted(imagenet_sample: Path) -> None:
    for path in imagenet_sample.glob("*/*"):
        data = path.read_bytes()
        assert undecodable_reason(data, *Image.open(io.BytesIO(data)).size) is None


def test_a_multi_picture_file_of_a_phone_is_read_as_its_first_jpeg() -> None:
    data = encoded(photograph(), "MPO", save_all=True, append_images=[photograph(seed=1)]).tobytes()
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert inspect(data) == ImageInfo("jpg", 300, 200)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 4}])
def test_damaged_files_are_accepted_if_and_only_if_pil_decodes_them(options: dict) -> None:
    """Flips, zeroes or removes bytes at 150 positions of each kind of JPEG."""
    random, whole = np.random.default_rng(0), encoded(photograph(), "JPEG", **options)
    verdicts = set()
    for number in range(150):
        damaged, position = whole.copy(), int(random.integers(2, len(whole) - 2))
        if number % 3 == 0:
            damaged[position] ^= 1 << int(random.integers(8))
        elif number % 3 == 1:
            damaged[position : position + 40] = 0
        else:
            damaged = np.concatenate([whole[:position], whole[-2:]])
        by_pil, by_inspect = [verdict(function, damaged.tobytes()) for function in (decode_with_pil, inspect)]
        assert by_pil == by_inspect
        verdicts.add(by_pil)
    assert len(verdicts) > 1


def verdict(function: Callable[[bytes], object], data: bytes) -> bool:
    try:
        function(data)
    except UnusableImageError:
        return False
    return True
