"""What there is to pack: the images of a class-folder tree, in a fixed order."""

import os
from dataclasses import dataclass
from pathlib import Path

from shards.errors import DatasetError

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}  # a hint only: content decides


@dataclass(frozen=True)
class Source:
    """One file that may become a sample."""

    path: str
    """Relative to the tree's root, with forward slashes."""
    label: int
    size: int
    """Bytes."""


@dataclass(frozen=True)
class SourceTree:
    root: Path
    classes: list[str]
    """Folder names, sorted; a label is a place in this list."""
    sources: list[Source]
    """Sorted by path."""
    others: list[str]
    """Files that are not named as images are."""


def find_sources(root: Path) -> SourceTree:
    """The images of `root`, one folder a class, at any depth below its class.

    Raises:
        DatasetError: no folder, no class folder, a class folder without an image, or a file that cannot be read.
    """
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder; SRC is a folder that holds one folder of images a class")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    sources, others = [], []
    for label, name in enumerate(classes):
        found = [Path(folder, file) for folder, _, files in os.walk(root / name) for file in files]
        images = [path for path in found if path.suffix.lower() in _SUFFIXES]
        if not images:
            raise DatasetError(f"{root / name}: this class folder holds no images; fill it or remove it")
        others += [path.relative_to(root).as_posix() for path in found if path not in set(images)]
        sources += [Source(path.relative_to(root).as_posix(), label, _readable_size(path)) for path in images]
    if not sources:
        raise DatasetError(f"{root}: no images in it; SRC is a folder that holds one folder of images a class")
    return SourceTree(root, classes, sorted(sources, key=lambda source: source.path), sorted(others))


def _readable_size(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}); make it readable or remove it") from None
