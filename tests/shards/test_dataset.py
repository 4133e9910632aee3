"""A packed dataset opens in O(1) and returns exactly the samples that were packed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maelstream.jobs.pack import main as pack
from maelstream.shards.dataset import Dataset, with_checksum
from maelstream.shards.errors import DatasetError
from maelstream.shards.reader import ShardReader
from tests.conftest import write_images


@pytest.fixture
def copy(packed: Dataset, tmp_path: Path) -> Path:
    """A copy of the packed dataset that a test may damage."""
    return Path(shutil.copytree(packed.folder, tmp_path / "copy"))


def edit_manifest(folder: Path, **values: object) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(with_checksum(json.loads(path.read_text()) | values)))


def read_all(folder: Path, check_crc: bool = False) -> list[np.ndarray]:
    dataset = Dataset.open(folder)
    return ShardReader(dataset, check_crc).read(np.arange(len(dataset)))


def test_columns_are_views_of_the_memory_map(packed: Dataset) -> None:
    for column in (packed.shard, packed.offset, packed.size, packed.width, packed.height, packed.label, packed.crc32c):
        assert len(column) == 60 and not column.flags.owndata and not column.flags.writeable


def test_samples_are_read_in_any_order(packed: Dataset) -> None:
    samples = np.array([59, 0, 31, 0])
    whole = ShardReader(packed, check_crc=True).read(np.arange(60))
    picked = ShardReader(packed, check_crc=False).read(samples)
    assert [data.tobytes() for data in picked] == [whole[sample].tobytes() for sample in samples]
    assert not any(data.flags.writeable for data in picked)


def test_different_datasets_have_different_fingerprints(packed: Dataset, copy: Path) -> None:
    assert Dataset.open(copy).fingerprint == packed.fingerprint
    edit_manifest(copy, name="another")
    assert Dataset.open(copy).fingerprint != packed.fingerprint


def test_a_missing_folder_and_an_unfinished_one_have_different_errors(copy: Path) -> None:
    (copy / "dataset.json").unlink()
    with pytest.raises(DatasetError, match="its packing was not finished"):
        Dataset.open(copy)
    with pytest.raises(DatasetError, match=r"not a packed dataset .*missing.*maelstream pack SRC"):
        Dataset.open(copy / "nowhere")


@pytest.mark.parametrize("manifest", ['{"name": "birds"}', "[1, 2]", "3", '{"format_version": "1.0"}'])
def test_the_manifest_of_another_program_is_named(copy: Path, manifest: str) -> None:
    (copy / "dataset.json").write_text(manifest)
    with pytest.raises(DatasetError, match=r"not a packed dataset \(its dataset\.json is another program's\)"):
        Dataset.open(copy)


def test_shards_without_an_index_are_to_be_indexed_and_images_to_be_packed(copy: Path, tmp_path: Path) -> None:
    for name in ("dataset.json", "index.arrow"):
        (copy / name).unlink()
    with pytest.raises(DatasetError, match=r"no dataset\.json\); `maelstream index .*copy` makes one of its tar"):
        Dataset.open(copy)
    write_images(tmp_path / "images", classes=1, per_class=1)
    with pytest.raises(DatasetError, match=r"no dataset\.json\); `maelstream pack .*images DST` makes one"):
        Dataset.open(tmp_path / "images")


def test_a_dataset_of_a_newer_format_is_rejected(copy: Path) -> None:
    edit_manifest(copy, format_version=2)
    with pytest.raises(DatasetError, match="packed by a newer maelstream"):
        Dataset.open(copy)


def test_an_edited_manifest_is_rejected(copy: Path) -> None:
    path = copy / "dataset.json"
    path.write_text(path.read_text().replace("class00", "class90"))
    with pytest.raises(DatasetError, match="its checksum does not match"):
        Dataset.open(copy)


def test_a_stale_index_is_rejected(copy: Path) -> None:
    edit_manifest(copy, samples=61)
    with pytest.raises(DatasetError, match=r"has 60 samples, dataset\.json says 61"):
        Dataset.open(copy)


@pytest.mark.parametrize("name", ["dataset.json", "index.arrow"])
def test_a_truncated_side_file_is_rejected(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(DatasetError, match="damaged"):
        Dataset.open(copy)


def test_a_truncated_or_missing_shard_is_rejected(copy: Path) -> None:
    shard = copy / Dataset.open(copy).shard_names[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    with pytest.raises(DatasetError, match=r"000001\.tar has .* bytes, .* were packed"):
        read_all(copy)
    shard.unlink()
    with pytest.raises(DatasetError, match=r"000001\.tar cannot be read"):
        read_all(copy)


def test_a_flipped_bit_is_found_when_checksums_are_checked(copy: Path) -> None:
    dataset = Dataset.open(copy)
    with (copy / dataset.shard_names[0]).open("r+b") as shard:
        shard.seek(int(dataset.offset[0] + dataset.size[0] // 2))
        byte = shard.read(1)[0]
        shard.seek(-1, 1)
        shard.write(bytes([byte ^ 1]))
    with pytest.raises(DatasetError, match=f"sample {dataset.keys(np.array([0]))[0]} is not what was packed"):
        read_all(copy, check_crc=True)


def test_a_shard_that_is_truncated_while_in_use_is_one_clear_error(copy: Path) -> None:
    dataset = Dataset.open(copy)
    reader, samples = ShardReader(dataset, check_crc=False), np.arange(len(dataset))
    reader.read(samples)
    os.truncate(copy / dataset.shard_names[1], 2000)
    with pytest.raises(DatasetError, match=r"000001\.tar was truncated while in use"):
        reader.read(samples)


def test_a_shard_that_is_deleted_while_in_use_is_read_to_the_end(copy: Path) -> None:
    dataset = Dataset.open(copy)
    reader, samples = ShardReader(dataset, check_crc=True), np.arange(len(dataset))
    before = [data.tobytes() for data in reader.read(samples)]
    (copy / dataset.shard_names[1]).unlink()
    assert [data.tobytes() for data in reader.read(samples)] == before
    with pytest.raises(DatasetError, match=r"000001\.tar cannot be read"):
        ShardReader(dataset, check_crc=True).read(samples)


def test_more_shards_than_a_process_may_open_are_read(tmp_path: Path) -> None:
    images = write_images(tmp_path / "src", classes=1, per_class=60)
    assert pack([str(images), str(tmp_path / "out"), "--shard-size", "1B", "--workers", "1"]) == 0
    script = (
        "import resource, sys, numpy as np\n"
        "from maelstream.shards.dataset import Dataset\n"
        "from maelstream.shards.reader import ShardReader\n"
        "dataset = Dataset.open(sys.argv[1]); assert len(dataset.shard_names) == 60\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "reader = ShardReader(dataset, check_crc=True)\n"
        "assert sum(len(reader.read(np.arange(60))) for _ in range(3)) == 180\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=True)
