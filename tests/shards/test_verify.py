"""`maelstream verify` finds and locates every flipped byte, every truncation, and missing or extra shards."""

import shutil
from collections.abc import Generator, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maelstream.jobs.command import run
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import DatasetError
from maelstream.shards.verify import verify, verify_shard


@pytest.fixture
def copy(packed: Dataset, tmp_path: Path) -> Path:
    """A copy of the packed dataset that a test may damage."""
    return Path(shutil.copytree(packed.folder, tmp_path / "copy"))


class InThisProcess:
    """An executor that runs jobs in the test's process."""

    def run(self, task: str, jobs: Iterable[Any]) -> Generator[Any, None, None]:
        assert task == "maelstream.shards.verify:verify_shard"
        yield from map(verify_shard, jobs)


def faults(folder: Path, deep: bool = False) -> list[str]:
    return [str(fault) for fault in verify(Dataset.open(folder), deep, InThisProcess(), lambda: None)]


def test_an_undamaged_dataset_has_no_faults(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert faults(copy) == faults(copy, deep=True) == []
    assert run("verify", [str(copy)]) == 0
    assert "60 samples in" in capsys.readouterr().out


def test_zero_workers_are_an_error(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", [str(copy), "--workers", "0"]) == 2
    assert "--workers 0: at least one is needed" in capsys.readouterr().err


def test_every_flipped_byte_of_every_file_is_found(copy: Path) -> None:
    """One bit is flipped and restored at each of 500 random positions over all files."""
    random = np.random.default_rng(0)
    files = sorted(path for path in copy.iterdir() if path.stat().st_size)
    for path in files:
        original = path.read_bytes()
        for position in random.integers(0, len(original), 500 // len(files) + 1):
            flipped = bytearray(original)
            flipped[position] ^= 1 << int(random.integers(8))
            path.write_bytes(flipped)
            with suppress(DatasetError):  # a damaged manifest or index raises before the rest is read
                assert faults(copy), f"byte {position} of {path.name}"
        path.write_bytes(original)
    assert faults(copy) == []


def test_every_truncation_at_a_block_is_found(copy: Path) -> None:
    shard = copy / Dataset.open(copy).shard_names[0]
    original = shard.read_bytes()
    for length in range(0, len(original), 512):
        shard.write_bytes(original[:length])
        assert any(f"{length} bytes, {len(original)} were packed" in fault for fault in faults(copy))


def test_a_flipped_byte_is_named_by_shard_and_sample(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = Dataset.open(copy)
    shard, key = dataset.shard_names[1], dataset.keys(np.flatnonzero(dataset.shard[:] == 1))[2]
    position = int(dataset.offset[dataset.shard[:] == 1][2]) + 30
    data = bytearray((copy / shard).read_bytes())
    data[position] ^= 4
    (copy / shard).write_bytes(data)
    assert run("verify", [str(copy)]) == 1
    printed = capsys.readouterr().out
    assert f"{shard}: not the bytes that were packed (SHA-256)" in printed
    assert f"{shard}, sample {key}: not the bytes that were packed (CRC32C)" in printed
    assert "2 faults" in printed


def test_missing_swapped_and_extra_shards_are_named(copy: Path) -> None:
    first, second, third = Dataset.open(copy).shard_names[:3]
    (copy / first).unlink()
    (copy / "stray.tar").write_bytes(b"")
    second_bytes = (copy / second).read_bytes()
    (copy / second).write_bytes((copy / third).read_bytes())
    (copy / third).write_bytes(second_bytes)
    found = faults(copy)
    assert f"{first}: missing" in found and "stray.tar: a shard that is not in the dataset" in found
    for name in (second, third):
        assert any(fault.startswith(f"{name}, sample") and "the index points at" in fault for fault in found)


def test_a_stale_idx_is_named(copy: Path) -> None:
    names = [Path(name).with_suffix(".idx").name for name in Dataset.open(copy).shard_names[:2]]
    (copy / names[0]).write_bytes((copy / names[1]).read_bytes())
    assert faults(copy) == [f"{names[0]}: not the bytes that were packed (SHA-256)"]
