"""An image whose decoder crashes or hangs is found by bisection and named; the build continues."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from maelstream.shards import checks
from maelstream.shards.checks import check_images
from maelstream.shards.executors import Local
from maelstream.shards.inspect import Conversion, ImageInfo
from maelstream.shards.pack import pack
from tests.conftest import encoded, photograph
from tests.shards.conftest import OPTIONS

CRASHES, HANGS, IS_KILLED, EXITS = (
    encoded(photograph(), "JPEG", comment=f"decoder {what}".encode()).tobytes()
    for what in ("crashes", "hangs", "is killed", "exits")
)
SOUND = encoded(photograph(), "JPEG").tobytes()
SITECUSTOMIZE = """
import importlib.abc, importlib.util, os, signal, sys, time

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "simplejpeg":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        original = spec.loader.exec_module
        def exec_module(module):
            original(module)
            decode = module.decode_jpeg
            def odd(data, *args, **kwargs):
                if b"decoder crashes" in data:
                    os.kill(os.getpid(), signal.SIGSEGV)
                if b"decoder hangs" in data:
                    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
                    time.sleep(1000)
                if b"decoder is killed" in data:
                    os.kill(os.getpid(), signal.SIGKILL)
                if b"decoder exits" in data:
                    os._exit(7)
                return decode(data, *args, **kwargs)
            module.decode_jpeg = odd
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
import maelstream.shards.checks
maelstream.shards.checks.IMAGE_LIMIT_S = 1
"""


@pytest.fixture
def odd_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In child processes, the decoder crashes, hangs or exits at the images above; 1 s is the time limit."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    monkeypatch.setattr(checks, "IMAGE_LIMIT_S", 1)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), *sys.path]))


REASONS = {
    CRASHES: "decoding it ends the process (SIGSEGV)",
    HANGS: "decoding it takes more than 1 s",
    IS_KILLED: "decoding it gets the process killed, perhaps because memory runs out",
    EXITS: "decoding it ends the process (exit code 7)",
}


def test_bisection_finds_every_image_that_ends_the_process(odd_decoder: None) -> None:
    images = [SOUND] * 5 + [CRASHES] + [SOUND] * 4 + [EXITS, IS_KILLED, SOUND]
    checked = list(check_images(enumerate(images), Conversion(), isolated=True))
    assert [number for number, _ in checked] == list(range(len(images)))
    for (_, result), data in zip(checked, images, strict=True):
        assert result == REASONS.get(data, (SOUND, ImageInfo("jpg", 300, 200)))


def test_a_build_leaves_out_images_whose_decoder_crashes_or_hangs_and_continues(
    odd_decoder: None, tmp_path: Path
) -> None:
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(encoded(photograph(seed=number), "JPEG").tobytes())
    for name, data in {"crash.jpg": CRASHES, "hang.jpg": HANGS}.items():
        (folder / name).write_bytes(data)
    result = pack(str(folder.parent), str(tmp_path / "out"), OPTIONS, Local(2), lambda _: None)
    assert (result.samples, result.quarantined) == (6, 2)
    lines = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    assert {line["source"]: line["reason"] for line in lines} == {
        "class/crash.jpg": REASONS[CRASHES],
        "class/hang.jpg": REASONS[HANGS],
    }


def test_the_time_limit_is_that_of_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """The alarm is set anew for each image, and is off afterwards."""
    remaining = []

    def convert(data: bytes, conversion: Conversion) -> tuple[bytes, ImageInfo]:
        remaining.append(signal.alarm(0))
        time.sleep(0.6)
        return data, ImageInfo("jpg", 1, 1)

    monkeypatch.setattr(checks, "convert", convert)
    monkeypatch.setattr(checks, "IMAGE_LIMIT_S", 5)
    list(check_images(enumerate([b""] * 3), Conversion(), isolated=False))
    assert remaining == [5, 5, 5] and signal.alarm(0) == 0


def test_results_are_the_same_isolated_or_not() -> None:
    images = [SOUND, b"text", encoded(photograph(), "PNG").tobytes(), np.random.default_rng(0).bytes(1000)]
    here, isolated = (list(check_images(enumerate(images), Conversion(resize=50), flag)) for flag in (False, True))
    assert here == isolated
