"""What the names of files and folders mean: splits, class folders, and the files of operating systems."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from maelstream.shards.errors import DatasetError
from maelstream.shards.labels import nfc

SPLITS = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation"},
    "test": {"test", "testing"},
}
"""Words in names that mean a split, by the value of --split."""
_SYSTEM = {
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "lost+found"),
    *("$recycle.bin", "system volume information"),
}


def is_system(name: str) -> bool:
    """Whether an operating system, a desktop or a notebook made this file or folder, or its name hides it (`.name`)."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in _SYSTEM


def in_system_folder(path: str) -> bool:
    """Whether any part of `path` is such a name."""
    return any(map(is_system, path.split("/")))


def words_of(split: str) -> set[str]:
    """Words in names that mean `split`."""
    return SPLITS.get(split, {split})


def splits_among(folders: Iterable[str], split: str) -> dict[str, str] | None:
    """The split that each folder's name means; None if these folders are no splits.

    They are splits if every name is one, or if two different splits are among them: a class may be called `train`.
    """
    known = {word: value for value, words in (SPLITS | {split: words_of(split)}).items() for word in words}
    names = list(folders)
    found = {name: known[word] for name in names if (word := re.sub(r"[-_]?20\d\d$", "", name.lower())) in known}
    return found if found and (len(found) == len(names) or len(set(found.values())) > 1) else None


class FolderClasses(NamedTuple):
    """What folders of images mean."""

    labels: dict[str, str]
    """Class of each folder that belongs to the split; "" for a folder above the class folders."""
    classes: list[str]
    """Class names, sorted, in Unicode's form NFC."""
    root: str
    """The folder that holds the class folders, "" if it is the top."""
    splits: bool
    """Whether there were several splits, of which one was chosen."""
    beside: list[str]
    """Folders beside those of the splits."""


def folder_classes(folders: Iterable[str], split: str, shown: str, wrapped: bool) -> FolderClasses:
    """Finds the classes in the paths of all folders that hold images ("" is the top): `train/cat`, `val/dog/young`.

    Where folders are splits, only `split` counts: above the classes, or below each of them. `wrapped` says that one
    folder alone is no class but holds the classes, as in a tar.

    Raises:
        DatasetError: the folders are splits and none of them, or more than one, is `split`.
    """
    parts = {folder: [part for part in folder.split("/") if part not in ("", ".")] for folder in folders}
    depth, splits, beside = 0, False, list[str]()

    def below(level: int) -> set[str]:
        return {path[level] for path in parts.values() if len(path) > level}

    while True:
        names = below(depth)
        if not splits and (found := splits_among(names, split)) is not None:
            wanted = _chosen(found, split, "/".join([shown, *next(iter(parts.values()))[:depth]]))
            beside = sorted(names - set(found))
            parts = {folder: path for folder, path in parts.items() if len(path) > depth and path[depth] == wanted}
            splits = True
        elif not (
            len(names) == 1
            and all(len(path) > depth for path in parts.values())
            and (wrapped or (not splits and splits_among(below(depth + 1), split)))
            and below(depth + 1)
        ):
            break
        depth += 1
    if not splits and names:
        inside: dict[str, set[str]] = {name: set() for name in names}
        for path in parts.values():
            if len(path) > depth:
                inside[path[depth]].add(path[depth + 1] if len(path) > depth + 1 else "")
        if all("" not in inner and splits_among(inner, split) for inner in inside.values()):
            found = splits_among(below(depth + 1), split) or {}
            wanted = _chosen(found, split, f"{shown}/{min(names)}")
            beside = sorted(below(depth + 1) - set(found))
            parts = {f: path for f, path in parts.items() if len(path) > depth + 1 and path[depth + 1] == wanted}
            splits = True
    labels = {folder: path[depth] if len(path) > depth else "" for folder, path in parts.items()}
    root = "/".join(next(iter(parts.values()), [])[:depth])
    return FolderClasses(labels, sorted({nfc(name) for name in names}), root, splits, beside)


def _chosen(found: dict[str, str], split: str, shown: str) -> str:
    chosen = sorted(name for name, value in found.items() if value == split)
    if len(chosen) == 1:
        return chosen[0]
    names = ", ".join(sorted(found)[:4])
    if chosen:
        raise DatasetError(f"{shown} holds {' and '.join(chosen)}, all of split {split}; give one of them as SRC")
    raise DatasetError(f"{shown} holds the splits {names}, and none is {split}; choose one by --split")
