"""Adopting existing shards: their bytes stay unchanged, and every reader gets the samples in the tars."""

import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest

from maelstream.jobs.command import run
from maelstream.shards.dataset import Dataset
from maelstream.shards.reader import ShardReader
from tests.conftest import encoded, photograph
from tests.shards.test_pack import by_stock_dali
from tests.shards.test_sources import IMAGES, quarantine, samples_of, webdataset_members, write_tar


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of 4 samples."""
    for number in range(2):
        write_tar(tmp_path / "wds" / f"photos-train-{number:04d}.tar", webdataset_members(4 * number, 4))
    return tmp_path / "wds"


def test_shards_are_indexed_in_place_and_not_rewritten(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, times = digests(shards), [path.stat().st_mtime_ns for path in sorted(shards.glob("*.tar"))]
    assert run("index", [str(shards), "--workers", "2"]) == 0
    assert "8 samples in 2 shards (2 built now), 0 files quarantined" in capsys.readouterr().out
    assert digests(shards) == before
    assert [path.stat().st_mtime_ns for path in sorted(shards.glob("*.tar"))] == times
    dataset = Dataset.open(shards)
    assert samples_of(dataset) == {IMAGES[n]: str(n % 4) for n in range(8)}
    assert dataset.keys(np.arange(8)) == [f"{n:04d}" for n in range(8)]  # the order of the tars
    assert (dataset.width[:].tolist(), set(dataset.height[:].tolist())) == ([40 + n for n in range(8)], {30})
    assert run("verify", [str(shards), "--deep"]) == run("info", [str(shards)]) == 0
    assert run("index", [str(shards), "--workers", "2"]) == 0
    assert "(0 built now)" in capsys.readouterr().out


def test_stock_dali_reads_adopted_shards_with_the_idx_files(shards: Path) -> None:
    assert run("index", [str(shards), "--workers", "1"]) == 0
    images, labels = by_stock_dali(shards, sorted(path.name for path in shards.glob("*.tar")), 8)
    assert images == IMAGES[:8] and labels == [str(n % 4).encode() for n in range(8)]


def test_the_split_file_of_timm_is_left_unchanged(shards: Path) -> None:
    published = '{"splits": {"train": {"num_samples": 8}}}'
    (shards / "_info.json").write_text(published)
    assert run("index", [str(shards), "--workers", "1"]) == 0
    assert (shards / "_info.json").read_text() == published
    assert run("verify", [str(shards)]) == 0


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_other_writers_with_long_and_non_ascii_names_are_adopted(tmp_path: Path, form: int) -> None:
    """DALI's own wds2idx writes wrong offsets for GNU tars with names over 100 characters."""
    (tmp_path / "wds").mkdir()
    names = ["a" * (90 if form == tarfile.USTAR_FORMAT else 150) + ".tench.jpg", "höhe/x.jpg", "./plain.jpg"]
    with tarfile.open(tmp_path / "wds" / "a.tar", "w", format=form) as tar:
        for name, image in zip(names, IMAGES, strict=False):
            path = tmp_path / "image"
            path.write_bytes(image)
            tar.add(path, name)
    assert run("index", [str(tmp_path / "wds"), "--workers", "1"]) == 0
    dataset = Dataset.open(tmp_path / "wds")
    # webdataset reads "a.tench.jpg" as extension "tench.jpg", which no image has
    assert samples_of(dataset) == dict.fromkeys(IMAGES[1:3], "")
    assert "only tench.jpg" in next(iter(quarantine(tmp_path / "wds").values()))
    assert run("verify", [str(tmp_path / "wds"), "--deep"]) == 0


def test_undecodable_images_are_left_out_of_the_index(shards: Path) -> None:
    gif = encoded(photograph(), "GIF").tobytes()
    write_tar(shards / "photos-train-0002.tar", [("g.jpg", gif), ("g.cls", b"1"), ("c.jpg", IMAGES[9][:300])])
    assert run("index", [str(shards), "--workers", "1"]) == 0
    dataset = Dataset.open(shards)
    assert len(dataset) == 8 and dataset.manifest["shards"][2]["samples"] == 0
    assert set(quarantine(shards)) == {"photos-train-0002.tar/g.jpg", "photos-train-0002.tar/c.jpg"}
    assert len(ShardReader(dataset, check_crc=True).read(np.arange(8))) == 8
    assert run("verify", [str(shards), "--deep"]) == 0


def test_a_flipped_byte_cut_or_swapped_shard_of_an_adopted_dataset_is_found(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("index", [str(shards), "--workers", "1"]) == 0
    path = shards / "photos-train-0001.tar"
    whole = path.read_bytes()
    offset = int(Dataset.open(shards).offset[5])
    for damaged, complaint in [
        (whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :], "sample 0005: not the bytes"),
        (whole[: offset // 512 * 512], "sample 0005: lies beyond the end"),
        ((shards / "photos-train-0000.tar").read_bytes(), "sample 0005: the index points at 0001.jpg"),
    ]:
        path.write_bytes(damaged)
        assert run("verify", [str(shards)]) == 1
        assert complaint in capsys.readouterr().out


def test_indexing_again_after_the_shards_changed_is_an_error(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("index", [str(shards), "--workers", "1"]) == 0
    write_tar(shards / "photos-train-0002.tar", webdataset_members(8, 2))
    assert run("index", [str(shards), "--workers", "1"]) == 2
    assert "remove dataset.json to index the tars as they are now" in capsys.readouterr().err
    (shards / "dataset.json").unlink()
    assert run("index", [str(shards), "--workers", "1"]) == run("verify", [str(shards)]) == 0
    assert len(Dataset.open(shards)) == 10


def test_a_folder_with_two_splits_or_without_images_is_an_error(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(shards / "photos-validation-0000.tar", webdataset_members(8, 2))
    assert run("index", [str(shards)]) == 2
    assert "photos-validation-0000.tar); a dataset is one split" in capsys.readouterr().err
    (shards / "empty").mkdir()
    assert run("index", [str(shards / "empty")]) == 2
    assert "no images in it" in capsys.readouterr().err
