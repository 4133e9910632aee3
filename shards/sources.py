"""What SRC is, found by looking at it: class folders, lists of images, the ILSVRC2012 tars, WebDataset shards, or
Parquet files.

Nothing but lists, names and sizes is read here; `shards/scan.py` reads inside tars and Parquet files.
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

from maelstream.shards.annotations import from_above, is_list, published_lists, read_annotations
from maelstream.shards.errors import DatasetError
from maelstream.shards.storage import Entry, Storage

SPLITS = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation"},
    "test": {"test"},
}
"""Words of file names that mean a split, by the name that users give it."""
_DEVKIT = "ILSVRC2012_devkit*.tar.gz"

FILES = pa.schema([("path", pa.large_string()), ("size", pa.uint64()), ("class", pa.large_string())])


@dataclass(frozen=True)
class Sources:
    """Files to take samples from. In `folders` and `listed` each is an image; in the other kinds each holds many."""

    storage: Storage
    kind: Literal["folders", "listed", "tars", "parquet"]
    files: pa.Table
    """Table of schema `FILES`: path below `storage`, bytes (null for a listed file that is missing), and the class
    folder, or the label in a list (empty in the other kinds)."""
    classes: list[str] | None
    """By label, where this is known before the samples are read."""
    ground_truth: list[str] | None = None
    """Class of each image of ILSVRC2012's validation tar, by its number less 1; of no other."""

    def digest(self) -> str:
        """SHA-256 of everything here; the same wherever the sources lie."""
        digest = hashlib.sha256(repr((self.kind, self.classes, self.ground_truth)).encode())
        for batch in self.files.to_batches(max_chunksize=2**16):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                digest.update(repr(row).encode())
        return digest.hexdigest()


def find_sources(source: str, split: str, classes: list[str] | None) -> Sources:
    """Looks at `source`: a folder, one list, tar or Parquet file, or a pattern (`train-{0000..1023}.tar`, `*.tar`).

    `split` chooses where there are files of several. `classes` are names by label, where the user has given them.

    Raises:
        DatasetError: nothing there, nothing to pack in it, or several things that could be meant.
    """
    # behind a URI's question mark are settings of its store
    path, mark, query = source.partition("?") if "://" in source else (source, "", "")
    above, _, last = path.rpartition("/")
    if any(letter in last for letter in "{*?["):
        folder = Storage.at((above or ".") + mark + query)
        return _containers(folder, _matching(folder, last), classes)
    where = Storage.at(source)
    kind = where.kind()
    if kind == FileType.NotFound:
        raise DatasetError(f"{source}: no such folder or file; SRC holds one folder of images a class, tars or Parquet")
    if kind == FileType.File and is_list(where.name):
        return _listed(*from_above(where.parent, where.name), classes)
    if kind == FileType.File:
        return _containers(where.parent, {where.name: _size(where)}, classes)
    entries = where.entries()
    if lists := published_lists(where, entries):
        return _listed(where, _list_of_split(where, lists, split), classes)
    tars = {entry.name: entry.size for entry in entries if entry.name.endswith((".tar", ".tar.gz", ".tgz"))}
    tars = {name: size for name, size in tars.items() if not fnmatch.fnmatch(name, _DEVKIT)}
    parquet = {entry.name: entry.size for entry in entries if entry.name.endswith(".parquet")}
    folder = where
    if not tars and not parquet and any(e.name == "data" and not e.is_file for e in entries):
        folder = where.inside("data")  # where Hugging Face puts a dataset's files
        parquet = {e.name: e.size for e in folder.entries() if e.name.endswith(".parquet")}
    if tars or parquet:
        return _containers(folder, _of_split(folder, tars or parquet, split), classes)
    return _class_folders(where, entries, classes)


def _list_of_split(folder: Storage, lists: list[str], split: str) -> str:
    wanted = SPLITS.get(split, {split})
    chosen = [name for name in lists if wanted & set(re.split(r"[^a-z]+", name.rpartition("/")[2]))]
    if len(chosen) != 1:
        raise DatasetError(
            f"{folder} holds {len(chosen) or 'no'} lists of split {split} (of {', '.join(lists[:4])}); choose by "
            f"--split, or give the list itself as SRC, such as {folder}/{lists[0]}"
        )
    return chosen[0]


def _listed(folder: Storage, name: str, given: list[str] | None) -> Sources:
    """What the list says, and the size of each image."""
    read = read_annotations(folder, name)
    paths = [f"{read.root}/{path}".lstrip("/") for path in read.labels]
    sizes: dict[str, int] = {}
    for above in sorted({path.rpartition("/")[0] for path in paths}):
        sizes |= {f"{above}/{e.name}".lstrip("/"): e.size for e in folder.entries(above) if e.is_file}
    if not sizes.keys() & set(paths):
        raise DatasetError(
            f"{folder}: none of the {len(paths):,} images of {name} is there ({paths[0]}, ...); unpack them"
        )
    files = pa.table([paths, [sizes.get(path) for path in paths], list(read.labels.values())], schema=FILES)
    return Sources(folder, "listed", files, given or read.classes)


def _containers(folder: Storage, sizes: dict[str, int], classes: list[str] | None) -> Sources:
    if packed := [name for name in sizes if name.endswith(("gz", "tgz"))]:
        raise DatasetError(f"{folder}/{packed[0]} is compressed and cannot be read at random; unpack it with gunzip")
    kinds = {name.rpartition(".")[2] for name in sizes}
    if kinds - {"tar", "parquet"} or len(kinds) > 1:
        raise DatasetError(f"{folder}: SRC names {', '.join(sorted(sizes)[:3])}; it takes .tar or .parquet files")
    names = sorted(sizes)
    files = pa.table([names, [sizes[name] for name in names], [""] * len(names)], schema=FILES)
    if kinds == {"parquet"}:
        return Sources(folder, "parquet", files, classes)
    if any(name.startswith("ILSVRC2012_img_val") for name in names):
        devkits = fnmatch.filter(sorted(folder.names()), _DEVKIT)
        if not devkits:
            raise DatasetError(
                f"{folder}/{names[0]} holds no labels; put ILSVRC2012_devkit_t12.tar.gz, which does, beside it"
            )
        known, ground_truth = _read_devkit(folder, devkits[0])
        return Sources(folder, "tars", files, known, ground_truth)
    return Sources(folder, "tars", files, classes)


def _read_devkit(folder: Storage, name: str) -> tuple[list[str], list[str]]:
    """Sorted WordNet ids of the classes, and that of each validation image.

    The devkit numbers classes in an order of its own (ILSVRC2012_ID), which is not that of the sorted WordNet ids.
    """
    from scipy.io import loadmat

    try:
        with folder.open(name) as file, folder.explained(name), tarfile.open(fileobj=file, mode="r:gz") as tar:
            held = {member.name.rpartition("/")[2]: member for member in tar.getmembers() if member.isreg()}
            meta, truth = (
                tar.extractfile(held[part]).read()  # type: ignore[union-attr]  # None for what is no file
                for part in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
            )
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        wnids = {int(number): str(wnid) for number, wnid in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)}
        return sorted(wnids.values()), [wnids[int(line)] for line in truth.split()]
    except (tarfile.TarError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise DatasetError(f"{folder}/{name} is damaged or no devkit ({error!r}); fetch it again") from None


def _of_split(folder: Storage, sizes: dict[str, int], split: str) -> dict[str, int]:
    """The files of `split`: all, when their names differ in numbers alone."""
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


def _matching(folder: Storage, patterns: str) -> dict[str, int]:
    """Files whose names fit, braces expanded first. Each that comes out of braces must be there."""
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


def _class_folders(root: Storage, entries: list[Entry], given: list[str] | None) -> Sources:
    folders = [e.name for e in entries if not e.is_file and not e.name.startswith(".")]
    loose = [(e.name, e.size) for e in entries if e.is_file]
    tables = [_table("", loose)]  # images beside the class folders have no class
    for name in folders:
        tables.append(_table(name, list(_files_below(root, name, 0))))
        if not len(tables[-1]):
            raise DatasetError(f"{root}/{name}: this class folder holds no images; fill it or remove it")
    files = pa.concat_tables(tables).combine_chunks()
    if not len(files):
        raise DatasetError(f"{root}: no images in it; SRC holds one folder of images a class, tars or Parquet files")
    if given is not None and (unknown := sorted(set(folders) - set(given))):
        raise DatasetError(f"{root}/{unknown[0]} is none of the {len(given)} classes given; add it, or rename it")
    return Sources(root, "folders", files, given or folders)


def _table(label: str, found: list[tuple[str, int]]) -> pa.Table:
    paths, sizes = zip(*found, strict=True) if found else ((), ())
    return pa.table([paths, sizes, [label] * len(found)], schema=FILES)


def _files_below(root: Storage, folder: str, depth: int) -> Iterator[tuple[str, int]]:
    """Path and size of each file."""
    if depth > 32:
        raise DatasetError(f"{root}/{folder}: 32 folders deep; a link that leads back into itself?")
    for entry in root.entries(folder):
        if entry.is_file:
            yield f"{folder}/{entry.name}", entry.size
        else:
            yield from _files_below(root, f"{folder}/{entry.name}", depth + 1)
