"""Recognises what SRC is: class folders, lists of images, the ILSVRC2012 tars, WebDataset shards, or Parquet files.

This file reads only lists, names and sizes; `shards/scan.py` reads the contents of tars and Parquet files.
"""

import fnmatch
import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import braceexpand
import pyarrow as pa
from pyarrow.fs import FileType

from maelstream.shards.annotations import is_list, list_from_image_root, published_lists, read_annotations
from maelstream.shards.errors import DatasetError
from maelstream.shards.storage import Entry, Storage

SPLITS = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation"},
    "test": {"test"},
}
"""Words in file names that mean a split, by the value of --split."""
_DEVKIT = "ILSVRC2012_devkit*.tar.gz"

FILES = pa.schema([("path", pa.large_string()), ("size", pa.uint64()), ("class", pa.large_string())])


@dataclass(frozen=True)
class Sources:
    """The files to pack. Of kind `folders` or `listed`, each file is an image; of the other kinds, each holds many."""

    storage: Storage
    kind: Literal["folders", "listed", "tars", "parquet"]
    files: pa.Table
    """Table of schema `FILES`: path below `storage`; bytes (null for a listed file that is missing); class folder or
    label in the list (empty for the other kinds)."""
    classes: list[str] | None
    """Class names by label, if known before the samples are read."""
    ground_truth: list[str] | None = None
    """Only for ILSVRC2012's validation tar: class of each image, at the index of its number less 1."""

    def digest(self) -> str:
        """SHA-256 of all fields except `storage`: it does not depend on where the sources are."""
        digest = hashlib.sha256(repr((self.kind, self.classes, self.ground_truth)).encode())
        for batch in self.files.to_batches(max_chunksize=2**16):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                digest.update(repr(row).encode())
        return digest.hexdigest()


def find_sources(source: str, split: str, classes: list[str] | None) -> Sources:
    """Finds the sources in `source`: a folder, a list, a tar or Parquet file, or a pattern (`train-{0000..1023}.tar`).

    `split` chooses files if there are several splits. `classes` are names by label, if the user gives them.

    Raises:
        DatasetError: `source` is missing, holds nothing to pack, or is ambiguous.
    """
    # A URI's query holds settings of its store.
    path, mark, query = source.partition("?") if "://" in source else (source, "", "")
    above, _, last = path.rpartition("/")
    if any(letter in last for letter in "{*?["):
        folder = Storage.at((above or ".") + mark + query)
        return _container_sources(folder, _matching_files(folder, last), classes)
    where = Storage.at(source)
    kind = where.kind()
    if kind == FileType.NotFound:
        raise DatasetError(
            f"{source}: no such folder or file; SRC holds one folder of images per class, tars or Parquet"
        )
    if kind == FileType.File and is_list(where.name):
        return _list_sources(*list_from_image_root(where.parent, where.name), classes)
    if kind == FileType.File:
        return _container_sources(where.parent, {where.name: _size(where)}, classes)
    entries = where.entries()
    if lists := published_lists(where, entries):
        return _list_sources(where, _list_of_split(where, lists, split), classes)
    tars = {entry.name: entry.size for entry in entries if entry.name.endswith((".tar", ".tar.gz", ".tgz"))}
    tars = {name: size for name, size in tars.items() if not fnmatch.fnmatch(name, _DEVKIT)}
    parquet = {entry.name: entry.size for entry in entries if entry.name.endswith(".parquet")}
    folder = where
    if not tars and not parquet and any(e.name == "data" and not e.is_file for e in entries):
        folder = where.inside("data")  # Hugging Face puts a dataset's files there
        parquet = {e.name: e.size for e in folder.entries() if e.name.endswith(".parquet")}
    if tars or parquet:
        return _container_sources(folder, _files_of_split(folder, tars or parquet, split), classes)
    return _folder_sources(where, entries, classes)


def _list_of_split(folder: Storage, lists: list[str], split: str) -> str:
    wanted = SPLITS.get(split, {split})
    chosen = [name for name in lists if wanted & set(re.split(r"[^a-z]+", name.rpartition("/")[2]))]
    if len(chosen) != 1:
        raise DatasetError(
            f"{folder} holds {len(chosen) or 'no'} lists of split {split} (of {', '.join(lists[:4])}); choose by "
            f"--split, or give the list itself as SRC, such as {folder}/{lists[0]}"
        )
    return chosen[0]


def _list_sources(folder: Storage, name: str, given: list[str] | None) -> Sources:
    """The images of the list `name`, with their sizes."""
    annotations = read_annotations(folder, name)
    paths = [f"{annotations.root}/{path}".lstrip("/") for path in annotations.labels]
    sizes: dict[str, int] = {}
    for above in sorted({path.rpartition("/")[0] for path in paths}):
        sizes |= {f"{above}/{e.name}".lstrip("/"): e.size for e in folder.entries(above) if e.is_file}
    if not sizes.keys() & set(paths):
        raise DatasetError(
            f"{folder}: none of the {len(paths):,} images in {name} exists ({paths[0]}, ...); unpack them"
        )
    files = pa.table([paths, [sizes.get(path) for path in paths], list(annotations.labels.values())], schema=FILES)
    return Sources(folder, "listed", files, given or annotations.classes)


def _container_sources(folder: Storage, sizes: dict[str, int], classes: list[str] | None) -> Sources:
    if compressed := [name for name in sizes if name.endswith(("gz", "tgz"))]:
        raise DatasetError(f"{folder}/{compressed[0]} is compressed and has no random access; unpack it with gunzip")
    kinds = {name.rpartition(".")[2] for name in sizes}
    if kinds - {"tar", "parquet"} or len(kinds) > 1:
        raise DatasetError(f"{folder}: SRC names {', '.join(sorted(sizes)[:3])}; use only .tar or only .parquet files")
    names = sorted(sizes)
    files = pa.table([names, [sizes[name] for name in names], [""] * len(names)], schema=FILES)
    if kinds == {"parquet"}:
        return Sources(folder, "parquet", files, classes)
    if any(name.startswith("ILSVRC2012_img_val") for name in names):
        devkits = fnmatch.filter(sorted(folder.names()), _DEVKIT)
        if not devkits:
            raise DatasetError(
                f"{folder}/{names[0]} holds no labels; put ILSVRC2012_devkit_t12.tar.gz, which holds them, next to it"
            )
        known, ground_truth = _read_devkit(folder, devkits[0])
        return Sources(folder, "tars", files, known, ground_truth)
    return Sources(folder, "tars", files, classes)


def _read_devkit(folder: Storage, name: str) -> tuple[list[str], list[str]]:
    """Sorted WordNet ids of the classes, and the WordNet id of each validation image.

    The devkit's class numbers (ILSVRC2012_ID) are not in the order of the sorted WordNet ids.
    """
    from scipy.io import loadmat

    try:
        with folder.open(name) as file, folder.dataset_errors(name), tarfile.open(fileobj=file, mode="r:gz") as tar:
            members = {member.name.rpartition("/")[2]: member for member in tar.getmembers() if member.isreg()}
            meta, truth = (
                tar.extractfile(members[part]).read()  # type: ignore[union-attr]  # None only for other than regular files
                for part in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
            )
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        wnids = {int(number): str(wnid) for number, wnid in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)}
        return sorted(wnids.values()), [wnids[int(line)] for line in truth.split()]
    except (tarfile.TarError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise DatasetError(f"{folder}/{name} is damaged or not a devkit ({error!r}); download it again") from None


def _files_of_split(folder: Storage, sizes: dict[str, int], split: str) -> dict[str, int]:
    """The files of `split`; all files if their names differ only in numbers."""
    groups = {re.sub(r"\d+", "#", name) for name in sizes}
    if len(groups) == 1:
        return sizes
    wanted = SPLITS.get(split, {split})
    chosen = {name: size for name, size in sizes.items() if wanted & set(re.split(r"[^a-z]+", name.lower()))}
    if not chosen:
        raise DatasetError(
            f"{folder} holds {len(groups)} groups of files ({', '.join(sorted(groups)[:4])}), none of split {split}; "
            f"choose by --split or by a pattern, such as '{folder}/{min(sizes)[:8]}*'"
        )
    return chosen


def _matching_files(folder: Storage, patterns: str) -> dict[str, int]:
    """Files whose names match, after brace expansion; each expanded pattern must match a file."""
    present = {entry.name: entry.size for entry in folder.entries() if entry.is_file}
    found: dict[str, int] = {}
    for pattern in braceexpand.braceexpand(patterns):
        names = fnmatch.filter(present, pattern)
        if not names:
            raise DatasetError(
                f"{folder}/{pattern}: no such file; SRC is a folder, a .tar or .parquet file or a pattern"
            )
        found |= {name: present[name] for name in names}
    return found


def _size(where: Storage) -> int:
    return where.parent.open(where.name).size()


def _folder_sources(root: Storage, entries: list[Entry], given: list[str] | None) -> Sources:
    folders = [e.name for e in entries if not e.is_file and not e.name.startswith(".")]
    unlabelled = [(e.name, e.size) for e in entries if e.is_file]
    tables = [_table("", unlabelled)]  # images next to the class folders
    for name in folders:
        tables.append(_table(name, list(_files_below(root, name, 0))))
        if not len(tables[-1]):
            raise DatasetError(f"{root}/{name}: this class folder holds no images; fill it or remove it")
    files = pa.concat_tables(tables).combine_chunks()
    if not len(files):
        raise DatasetError(f"{root}: no images in it; SRC holds one folder of images per class, tars or Parquet files")
    if given is not None and (unknown := sorted(set(folders) - set(given))):
        raise DatasetError(
            f"{root}/{unknown[0]} is not one of the {len(given)} classes in --classes; add it or rename the folder"
        )
    return Sources(root, "folders", files, given or folders)


def _table(label: str, found: list[tuple[str, int]]) -> pa.Table:
    paths, sizes = zip(*found, strict=True) if found else ((), ())
    return pa.table([paths, sizes, [label] * len(found)], schema=FILES)


def _files_below(root: Storage, folder: str, depth: int) -> Iterator[tuple[str, int]]:
    """Path and size of each file below `folder`, at any depth."""
    if depth > 32:
        raise DatasetError(f"{root}/{folder}: 32 folders deep; remove any link that leads back to a folder above it")
    for entry in root.entries(folder):
        if entry.is_file:
            yield f"{folder}/{entry.name}", entry.size
        else:
            yield from _files_below(root, f"{folder}/{entry.name}", depth + 1)
