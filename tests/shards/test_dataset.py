"""A packed dataset opens in O(1) and returns exactly the samples that were packed."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from maelstream.jobs.command import run
from maelstream.jobs.pack import main as pack
from maelstream.shards.dataset import Dataset, with_checksum
from maelstream.shards.errors import DatasetError
from maelstream.shards.index import NUMERIC_COLUMNS, Column
from maelstream.shards.reader import ShardReader
from maelstream.shards.storage import Storage
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


def test_columns_are_read_by_array_by_slice_and_by_sample(packed: Dataset) -> None:
    with pa.memory_map(f"{packed.folder}/index.arrow") as file:
        stored = pa.ipc.open_file(file).read_all()
    random = np.random.default_rng(0).integers(0, 60, 200)
    for name in NUMERIC_COLUMNS:
        column, expected = getattr(packed, name), stored[name].to_numpy()
        assert len(column) == 60 and column[:].dtype == column.dtype == expected.dtype
        for rows in (random, np.array([], int), expected == expected[3], slice(None), slice(50, 3, -7), slice(5, 5), 7):
            np.testing.assert_array_equal(column[rows], expected[rows])
        assert (column.min(), column.max()) == (expected.min(), expected.max())
    assert packed.keys(random) == [stored["key"][row].as_py() for row in random.tolist()]
    assert packed.sources(random[:2]) == [stored["source"][row].as_py() for row in random[:2].tolist()]


def test_rows_far_apart_are_read_one_by_one(tmp_path: Path) -> None:
    """Rows that are close together are read at once, others alone."""
    numbers = np.arange(100_000, dtype=np.uint32)
    path = tmp_path / "numbers"
    path.write_bytes(bytes(8) + numbers.tobytes())
    with path.open("rb") as file:
        calls: list[int] = []

        def read(offset: int, size: int) -> bytes:
            calls.append(size)
            return os.pread(file.fileno(), size, offset)

        column = Column("numbers", read, 8, 100_000, numbers.dtype, 0, 99_999)
        far, near = np.array([99_999, 0, 50_000]), np.array([70, 10, 80])
        assert column[far].tolist() == far.tolist() and calls == [4, 4, 4]
        assert column[near].tolist() == near.tolist() and calls[3:] == [71 * 4]


def test_a_sample_beyond_the_end_is_an_index_error(packed: Dataset) -> None:
    for rows in (np.array([60]), np.array([3, -1]), 60):
        with pytest.raises(IndexError):
            packed.label[rows]


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


def edit_index(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Rewrites the index, and the manifest's checksum of it."""
    path = folder / "index.arrow"
    table = change(pa.ipc.open_file(path.read_bytes()).read_all())
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    side_files = json.loads((folder / "dataset.json").read_text())["side_files"]
    side_files["index.arrow"] = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_manifest(folder, side_files=side_files)


def with_value(name: str, value: int | None) -> Callable[[pa.Table], pa.Table]:
    """Changes one column of sample 7."""

    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[7] = value
        number = table.schema.get_field_index(name)
        return table.set_column(number, table.schema.field(number), pa.array(values, table.schema.field(number).type))

    return change


@pytest.mark.parametrize("copies", ["truncated", "emptied"])
def test_an_index_that_is_truncated_while_in_use_is_one_clear_error(copy: Path, copies: str) -> None:
    """In a child process, because a memory-mapped index would end it by SIGBUS."""
    length = 0 if copies == "emptied" else 1000
    script = (
        "import os, sys, numpy as np\n"
        "from maelstream.shards.dataset import Dataset\n"
        "from maelstream.shards.errors import DatasetError\n"
        "dataset = Dataset.open(sys.argv[1])\n"
        f"os.truncate(sys.argv[1] + '/index.arrow', {length})\n"
        "reads = lambda: dataset.width[:], lambda: dataset.label[np.arange(5)], lambda: dataset.keys(np.arange(3))\n"
        "for read in reads:\n"
        "    try: read()\n"
        "    except DatasetError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(copy)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("index.arrow was truncated while in use")) == (0, 3), done.stderr


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("shard", 6, "shard of sample 7 is 6, not 0 to 5"),
        ("shard", 2**32 - 1, "shard of sample 7 is 4294967295"),
        ("offset", 2**64 - 1, "offset of sample 7 is 18446744073709551615"),
        ("size", 2**32 - 1, "size of sample 7 is"),
        ("label", -2, r"label of sample 7 is -2, not 0 to"),
        ("label", 2**31 - 1, "label of sample 7 is 2147483647"),
        ("width", 0, "width of sample 7 is 0"),
        ("height", 2**31, "height of sample 7 is"),
    ],
)
def test_numbers_out_of_range_are_one_clear_error(copy: Path, name: str, value: int, message: str) -> None:
    edit_index(copy, with_value(name, value))
    dataset = Dataset.open(copy)
    for read in (lambda: getattr(dataset, name)[:], lambda: getattr(dataset, name)[np.array([7])]):
        with pytest.raises(DatasetError, match=f"index.arrow: {message}"):
            read()
    assert run("info", [str(copy)]) in (0, 2)


def test_a_sample_that_ends_after_its_shard_is_one_clear_error(copy: Path) -> None:
    dataset = Dataset.open(copy)
    edit_index(copy, with_value("offset", dataset.manifest["shards"][0]["bytes"] - 1))
    with pytest.raises(DatasetError, match=r"index\.arrow: sample 7 ends after the end of its shard"):
        read_all(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns("label"), "has the columns shard uint32"),
        (
            lambda table: table.rename_columns([name.replace("label", "class") for name in table.column_names]),
            "columns",
        ),
        (lambda table: table.set_column(3, "width", table["width"].cast(pa.int64())), "width int64"),
        (lambda table: table.set_column(7, "key", table["key"].cast(pa.string())), "key string"),
        (lambda table: table.slice(0, 0), "no samples|has 0 samples|record batches"),
        (lambda table: table.slice(0, 59), "has 59 samples, dataset.json says 60"),
        (with_value("width", None), "width has missing values"),
    ],
)
def test_other_columns_and_rows_are_one_clear_error(
    copy: Path, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    edit_index(copy, change)
    with pytest.raises(DatasetError, match=message):
        Dataset.open(copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", "60"),
        ("samples", True),
        ("samples", 0),
        ("samples", 60.0),
        ("quarantined", None),
        ("classes", "birds"),
        ("classes", [1, 2]),
        ("shards", {}),
        ("shards", []),
        ("shards", [{"name": "a.tar"}]),
        ("shards", [{"name": "../a.tar", "samples": 60, "bytes": 1, "sha256": ""}]),
        ("shards", [{"name": "a.tar", "samples": 60, "bytes": -1, "sha256": ""}]),
        ("formats", [1]),
        ("options", None),
        ("options", {"resize": "big"}),
        ("side_files", []),
        ("side_files", {"index.arrow": 3}),
        ("name", ["a"]),
    ],
)
def test_fields_of_the_manifest_with_other_types_are_one_clear_error(copy: Path, field: str, value: object) -> None:
    edit_manifest(copy, **{field: value})
    with pytest.raises(DatasetError, match=rf"dataset\.json is damaged: {field} is "):
        Dataset.open(copy)


def test_a_missing_field_of_the_manifest_is_named(copy: Path) -> None:
    path = copy / "dataset.json"
    manifest = json.loads(path.read_text())
    del manifest["shards"]
    path.write_text(json.dumps(with_checksum(manifest)))
    with pytest.raises(DatasetError, match=r"dataset\.json is damaged: shards is missing"):
        Dataset.open(copy)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"samples": 1' + "0" * 5000 + "}", '{"name": "\\ud800"}'])
def test_a_manifest_that_json_cannot_hold_is_one_clear_error(copy: Path, text: str) -> None:
    (copy / "dataset.json").write_text(text)
    with pytest.raises(DatasetError, match=r"dataset\.json is damaged"):
        Dataset.open(copy)


def test_an_edited_number_of_the_index_is_found_by_its_checksum(copy: Path) -> None:
    path = copy / "index.arrow"
    data = bytearray(path.read_bytes())
    position = data.index(Dataset.open(copy).width[:].tobytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"index\.arrow is damaged \(its checksum does not match\)"):
        Dataset.open(copy)
    assert run("verify", [str(copy)]) == 1  # which lists it among all faults


def test_random_bytes_in_the_index_never_lead_out_of_the_dataset(copy: Path) -> None:
    """300 edits that the checksum is not asked about, as for a large index: an error, or rows in their ranges."""
    path, storage = copy / "index.arrow", Storage.at(copy)
    original, random = path.read_bytes(), np.random.default_rng(0)
    messages = []
    for position in random.integers(0, len(original), 300).tolist():
        data = bytearray(original)
        data[position] = (data[position] + int(random.integers(1, 256))) % 256
        path.write_bytes(data)
        try:
            dataset = Dataset.open_storage(storage, hashed_bytes=0)
            samples = np.arange(len(dataset))
            ShardReader(dataset, check_crc=False).read(samples)
            for column in (dataset.width, dataset.height, dataset.label):
                column.min()
            dataset.keys(samples), dataset.sources(samples)
        except DatasetError as error:
            messages.append(str(error))
    assert len(messages) > 30
    assert not any("\n" in message for message in messages)
