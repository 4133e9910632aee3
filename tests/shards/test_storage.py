"""Listing a folder while other processes write to it."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from maelstream.shards.errors import DatasetError
from maelstream.shards.storage import Storage


def test_a_file_that_disappears_while_its_folder_is_listed_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another part of the build renames its file after the folder was listed and before the file is examined."""
    for name in ("kept", "deleted"):
        (tmp_path / name).write_bytes(b"123")
    listed = os.scandir

    def scandir_then_delete(where: str) -> Iterator[os.DirEntry[str]]:
        found = list(listed(where))
        (tmp_path / "deleted").unlink()
        return iter(found)

    monkeypatch.setattr("maelstream.shards.storage.os.scandir", scandir_then_delete)
    assert [(entry.name, entry.size) for entry in Storage.at(tmp_path).entries()] == [("kept", 3)]


def test_a_broken_link_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"link cannot be read .*make it readable or remove it"):
        Storage.at(tmp_path).entries()


def test_a_path_that_is_not_utf8_is_one_clear_error() -> None:
    """Python holds its bytes as surrogates, which pyarrow cannot open and a terminal cannot print."""
    with pytest.raises(DatasetError, match=r"^'data/\\udcff': the path is not UTF-8; rename the folder$"):
        Storage.at("data/\udcff")


def test_a_full_disk_under_temporary_files_is_one_line(tmp_path: Path) -> None:
    storage = Storage.at(tmp_path)
    storage.make()
    with pytest.raises(DatasetError, match=r"\.pack cannot be written \(No space left on device\)"), storage.scratch():
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list((tmp_path / ".pack").iterdir()) == []
