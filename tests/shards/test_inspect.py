"""What may become a sample: sound by its header, its end and a full decode; the loader asks for the first two again."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maelstream.shards.inspect import ImageInfo, Unfit, decoded, inspect, refusal
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
        (JPEG[:100], "JPEG without a sound header of 300 x 200 pixels"),
        (JPEG[:2] + bytes(300) + JPEG[302:], "JPEG without a sound header of 300 x 200 pixels"),
        (encoded(photograph(301, 200), "JPEG").tobytes(), "JPEG without a sound header of 300 x 200 pixels"),
        (PNG[:10] + bytes(20) + PNG[30:], "PNG without a sound header of 300 x 200 pixels"),
        (BMP[:10] + bytes(20) + BMP[30:], "BMP without a sound header of 300 x 200 pixels"),
        (JPEG[:-20], "JPEG without an end marker"),
        (PNG[: len(PNG) // 2], "PNG without an IEND chunk"),
        (WEBP[:-100], "WebP shorter than its header says"),
        (BMP[:-1], "BMP shorter than its header says"),
    ],
)
def test_what_would_take_the_process_down_is_refused_before_dali_sees_it(data: bytes, reason: str) -> None:
    assert refusal(data, 300, 200) == reason


@pytest.mark.parametrize("data", [JPEG, PNG, WEBP, BMP, JPEG + b"trailing bytes"])
def test_whole_files_are_let_through(data: bytes) -> None:
    assert refusal(data, 300, 200) is None


def test_every_imagenet_file_is_let_through(imagenet_sample: Path) -> None:
    for path in imagenet_sample.glob("*/*"):
        data = path.read_bytes()
        assert refusal(data, *Image.open(io.BytesIO(data)).size) is None


def test_a_phone_s_multi_picture_file_is_the_jpeg_that_it_begins_with() -> None:
    data = encoded(photograph(), "MPO", save_all=True, append_images=[photograph(seed=1)]).tobytes()
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert inspect(data) == ImageInfo("jpg", 300, 200)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 4}])
def test_damage_gets_the_verdict_of_a_full_decode_by_pil(options: dict) -> None:
    """Flipped bytes, holes and cuts at 150 places of each kind of JPEG."""
    random, whole = np.random.default_rng(0), encoded(photograph(), "JPEG", **options)
    verdicts = set()
    for number in range(150):
        damaged, place = whole.copy(), int(random.integers(2, len(whole) - 2))
        if number % 3 == 0:
            damaged[place] ^= 1 << int(random.integers(8))
        elif number % 3 == 1:
            damaged[place : place + 40] = 0
        else:
            damaged = np.concatenate([whole[:place], whole[-2:]])
        by_pil, ours = [verdict(function, damaged.tobytes()) for function in (decoded, inspect)]
        assert by_pil == ours
        verdicts.add(by_pil)
    assert len(verdicts) > 1


def verdict(function: Callable[[bytes], object], data: bytes) -> bool:
    try:
        function(data)
    except Unfit:
        return False
    return True
