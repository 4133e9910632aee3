"""Listing folders that others write to."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from maelstream.shards.errors import DatasetError
from maelstream.shards.storage import Storage


def test_a_file_that_goes_while_its_folder_is_listed_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another part of a build renames what it has written, between this one's listing and its look at the file."""
    for name in ("stays", "goes"):
        (tmp_path / name).write_bytes(b"123")
    listed = os.scandir

    def then_gone(where: str) -> Iterator[os.DirEntry[str]]:
        found = list(listed(where))
        (tmp_path / "goes").unlink()
        return iter(found)

    monkeypatch.setattr("maelstream.shards.storage.os.scandir", then_gone)
    assert [(entry.name, entry.size) for entry in Storage.at(tmp_path).entries()] == [("stays", 3)]


def test_a_link_to_nowhere_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"link cannot be read .*make it readable or remove it"):
        Storage.at(tmp_path).entries()
