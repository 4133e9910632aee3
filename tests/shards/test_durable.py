"""Atomic writes on file systems that cannot sync folders, and that fail otherwise."""

import errno
import os
import stat
from pathlib import Path

import pytest

from maelstream.shards import durable
from maelstream.shards.durable import atomic_write
from maelstream.shards.errors import DatasetError


def write(path: Path) -> None:
    with atomic_write(path) as file:
        file.write(b"whole")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_is_reported_once_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    monkeypatch.setattr(durable, "_reported", set())
    monkeypatch.setattr(os, "fsync", failing(folders=True, code=code))
    for name in ("a", "b"):
        write(tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"whole"
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and f"{tmp_path}: its file system cannot sync folders" in printed


@pytest.mark.parametrize(("folders", "code"), [(True, errno.EIO), (False, errno.EINVAL), (False, errno.EIO)])
def test_other_failures_to_sync_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: bool, code: int
) -> None:
    monkeypatch.setattr(os, "fsync", failing(folders, code))
    with pytest.raises(DatasetError, match="cannot be written"):
        write(tmp_path / "a")


def failing(folders: bool, code: int):  # type: ignore[no-untyped-def]
    """`os.fsync` that fails for folders, or for files."""
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    return fail


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_a_name_as_long_as_file_systems_allow_is_written(tmp_path: Path, name: str) -> None:
    with atomic_write(tmp_path / name) as file:
        file.write(b"whole")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"whole")]


def test_a_longer_name_is_one_clear_error(tmp_path: Path) -> None:
    with (
        pytest.raises(DatasetError, match="cannot be written \\(File name too long\\)"),
        atomic_write(tmp_path / ("x" * 256)),
    ):
        pass
