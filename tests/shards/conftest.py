"""Fixtures for the tests of packing: images, and the dataset of an uninterrupted build."""

from pathlib import Path

import pytest

from maelstream.shards.executors import Local
from maelstream.shards.pack import pack
from maelstream.shards.plan import PackOptions
from tests.conftest import write_images

OPTIONS = PackOptions(name="tiny", split="train", shard_bytes=30_000, seed=3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 JPEGs of 4 classes."""
    return write_images(tmp_path_factory.mktemp("images"), classes=4, per_class=12)


@pytest.fixture(scope="module")
def built(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images packed with `OPTIONS`."""
    folder = tmp_path_factory.mktemp("built") / "tiny"
    pack(str(images), str(folder), OPTIONS, Local(2), lambda _: None)
    return folder
