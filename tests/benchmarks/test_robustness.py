"""The measurement of robustness counts what it must: crashes, hangs, lost files, other pictures and unnamed damage."""

import os
import random
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.robustness import (
    Died,
    Ended,
    Outcome,
    Suspect,
    collect,
    dali_picture,
    difference,
    flip_bytes,
    isolated,
    judge,
    mutated,
    pil_picture,
    seed_images,
    segments,
    through,
)
from maelstream.jobs.pack import main as pack
from maelstream.shards.dataset import Dataset
from maelstream.shards.reader import ShardReader
from tests.conftest import encoded, photograph


def act(item: str) -> str:
    if item == "crash":
        os.abort()
    if item == "hang":
        time.sleep(600)
    return item[0].upper() + item[1:]


def test_items_after_a_crash_an_error_and_a_hang_are_still_computed() -> None:
    answers = list(isolated(act, ["a", "crash", "b", "", "hang", "c"], 2.0))
    assert answers == [
        "A",
        Died("exit code -6"),
        "B",
        Died("raised IndexError('string index out of range')"),
        Died("hang"),
        "C",
    ]


def test_a_command_that_fails_is_counted_by_its_kind() -> None:
    outcome = Outcome()
    for code, output in ((0, ""), (-11, ""), (139, ""), (None, ""), (2, "x: bad"), (1, "Traceback (most recent call")):
        outcome.note("pack", Ended(code, 1.0, 1.0, output))
    kinds = [kind for kind, _ in outcome.failures]
    assert kinds == ["crash", "crash", "hang", "command failed", "command failed", "traceback"]


def test_sound_odd_and_damaged_files_pass_the_whole_path(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    (folder / "deep").mkdir(parents=True)
    seeds = seed_images()
    for name in ("baseline.jpg", "gray16.png", "lossy.webp", "rgb.bmp"):
        (folder / "deep" / name).write_bytes(seeds[name])
    (folder / "cut.jpg").write_bytes(seeds["baseline.jpg"][:900])
    (folder / "text.png").write_text("no image")
    (folder / "same.jpg").write_bytes(seeds["baseline.jpg"])  # counts once
    (folder / "notes.txt").write_text("not given as an image")
    collect(folder, tmp_path / "source" / "all")
    outcome = through(tmp_path / "source", tmp_path)
    assert (outcome.files, outcome.accepted, sum(outcome.refused.values())) == (6, 4, 2)
    assert outcome.failures == [] and outcome.refused_pictures == []


def test_an_accepted_file_that_decodes_to_another_picture_is_counted(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    photograph(80, 60, 1).save(tmp_path / "images" / "a" / "0.png")
    assert pack([str(tmp_path / "images"), str(tmp_path / "packed"), "--workers", "1"]) == 0
    same = judge(Suspect(str(tmp_path / "images" / "a" / "0.png"), str(tmp_path / "packed"), 0))
    photograph(80, 60, 2).save(tmp_path / "other.png")
    other = judge(Suspect(str(tmp_path / "other.png"), str(tmp_path / "packed"), 0))
    assert (same.pil, same.dali, same.levels, same.window_levels) == ("", "", 0, 0)
    assert other.levels > 10 and other.window_levels > 10


def test_seeds_are_20_sound_files_and_all_but_the_lossless_jpeg_decode_in_dali() -> None:
    seeds = seed_images()
    assert len(seeds) == 20
    for name, data in seeds.items():
        picture = pil_picture(data)
        if name == "lossless.jpg":
            assert picture.shape == (72, 96, 3)
            with pytest.raises(RuntimeError):
                dali_picture(data, None)
        else:
            assert difference(dali_picture(data, None), picture) < 1, name


def test_16_bit_gray_is_scaled_and_alpha_is_dropped() -> None:
    gray = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    assert pil_picture(encoded(gray, "PNG").tobytes())[0, :, 0].tolist() == [0, 1, 255]
    clear = Image.new("RGBA", (1, 1), (10, 20, 30, 0))
    assert pil_picture(encoded(clear, "PNG").tobytes())[0, 0].tolist() == [10, 20, 30]


def test_mutations_depend_on_the_seed_alone_and_change_nearly_every_file() -> None:
    seeds = seed_images().values()
    changed = [mutated(data, random.Random(number)) for number in range(20) for data in seeds]
    assert changed == [mutated(data, random.Random(number)) for number in range(20) for data in seeds]
    assert sum(one != data for one, data in zip(changed, [*seeds] * 20, strict=True)) > 380


def test_segments_cover_a_file() -> None:
    for name, data in seed_images().items():
        found = segments(data)
        assert all(end == start for (_, end), (start, _) in pairwise(found)), name
        assert found[-1][1] == len(data) and len(found) >= (1 if name.endswith("webp") else 2), name


def test_one_byte_of_each_damaged_image_is_changed(packed: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in Path(packed.folder).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    damaged = Dataset.open(folder)
    flip_bytes(damaged, [3, 41], random.Random(0))
    samples = np.arange(len(packed))
    pairs = zip(ShardReader(packed, False).read(samples), ShardReader(damaged, False).read(samples), strict=True)
    assert [int((a != b).sum()) for a, b in pairs] == [number in (3, 41) for number in range(len(packed))]
