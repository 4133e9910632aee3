"""Recognises what SRC is: class folders, lists of images, the ILSVRC2012 tars, WebDataset shards, or Parquet files.

This file reads only lists, names and sizes; `shards/scan.py` reads the contents of tars and Parquet files.
"""

import fnmatch
import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import braceexpand
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.fs import FileType

from maelstream.shards.annotations import is_list, list_from_image_root, published_lists, read_annotations
from maelstream.shards.braces import MAX_EXPANDED, expanded_count
from maelstream.shards.errors import DatasetError
from maelstream.shards.index import INDEX_NAME
from maelstream.shards.labels import nfc
from maelstream.shards.layout import SPLITS, folder_classes, is_system, words_of
from maelstream.shards.storage import Entry, Storage

_DEVKIT = "ILSVRC2012_devkit*.tar.gz"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_TARS = (".tar", *_COMPRESSED)
_IMAGES = r"(?i)\.(jpe?g|png|webp|bmp|gif|tiff?)$"

FILES = pa.schema([("path", pa.large_string()), ("size", pa.uint64()), ("class", pa.large_string())])


@dataclass(frozen=True)
class Sources:
    """The files to pack. Of kind `folders` or `listed`, each file is an image; of the other kinds, each holds many."""

    storage: Storage
    kind: Literal["folders", "listed", "tars", "parquet", "arrow"]
    files: pa.Table
    """Table of schema `FILES`: path below `storage`; bytes (null for a listed file that is missing); class folder or
    label in the list (empty for the other kinds)."""
    classes: list[str] | None
    """Class names by label, if known before the samples are read."""
    ground_truth: list[str] | None = None
    """Only for ILSVRC2012's validation tar: class of each image, at the index of its number less 1."""
    searched: Storage | None = None
    """The folder that was searched at any depth, if one was; a packed dataset cannot be inside it."""
    notices: tuple[str, ...] = ()
    """What the user should hear of: files that belong to no split or kind that was chosen."""

    def digest(self) -> str:
        """SHA-256 of the files, classes and kind: it does not depend on where the sources are."""
        digest = hashlib.sha256(repr((self.kind, self.classes, self.ground_truth)).encode())
        for batch in self.files.to_batches(max_chunksize=2**16):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                digest.update(repr(row).encode())
        return digest.hexdigest()


def find_sources(source: str, split: str, classes: list[str] | None, labels: bool) -> Sources:
    """Finds the sources in `source`: a folder, a list, a tar, Parquet or Arrow file, or a pattern of such files
    (`train-{0000..1023}.tar`).

    `split` chooses files if there are several splits. `classes` are names by label, if the user gives them. Without
    `labels`, none is looked for.

    Raises:
        DatasetError: `source` is missing, holds nothing to pack, or is ambiguous.
    """
    # A URI's query holds settings of its store.
    path, mark, query = source.partition("?") if "://" in source else (source, "", "")
    above, _, last = path.rpartition("/")
    if any(letter in last for letter in "{*?[") and ("://" in source or not os.path.lexists(source)):
        folder = Storage.at((above or ".") + mark + query)
        return _container_sources(folder, _matching_files(folder, last), classes, labels)
    where = Storage.at(source)
    kind = where.kind()
    if kind == FileType.NotFound:
        raise DatasetError(
            f"{source}: no such folder or file; SRC holds one folder of images per class, tars or Parquet"
        )
    if kind == FileType.File and is_list(where.name):
        return _list_sources(*list_from_image_root(where.parent, where.name), classes, labels)
    if kind == FileType.File:
        return _container_sources(where.parent, {where.name: _size(where)}, classes, labels)
    entries = where.entries(skip=is_system)
    if lists := published_lists(where, entries):
        return _list_sources(where, _list_of_split(where, lists, split), classes, labels)
    if containers := _containers(where, {entry.name: entry.size for entry in entries if entry.is_file}):
        chosen = _files_of_split(where, containers, split)
        found = _container_sources(where, chosen, classes, labels)
        others = [e.name for e in entries if e.name not in containers and (not e.is_file or _is_data(e.name))]
        return replace(found, notices=_left_out(f"{where}, beside the {found.kind}", others))
    return _sources_at_any_depth(where, entries, split, classes, labels)


def _containers(folder: Storage, sizes: dict[str, int]) -> dict[str, int]:
    """The files that hold many images among `sizes`: tars, else Parquet files, else Arrow files."""
    tars = {
        name: size
        for name, size in sizes.items()
        if name.endswith(_TARS) and not fnmatch.fnmatch(name.rpartition("/")[2], _DEVKIT)
    }
    parquet = {name: size for name, size in sizes.items() if name.endswith(".parquet")}
    arrow = {name: size for name, size in sizes.items() if name.endswith(".arrow")}
    for state in [name for name in sizes if name.rpartition("/")[2] == "state.json"] if arrow else ():
        above = state.removesuffix("state.json")
        try:  # of a saved dataset, next to which `datasets` may put caches
            listed = {above + entry["filename"] for entry in json.loads(folder.read(state))["_data_files"]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DatasetError(f"{folder}/{state} is damaged ({error!r}); save the dataset again") from None
        if missing := sorted(listed - set(arrow)):
            raise DatasetError(f"{folder}/{missing[0]} is missing, but listed in {state}; save the dataset again")
        arrow = {n: size for n, size in arrow.items() if n.rpartition("/")[0] != above[:-1] or n in listed}
    arrow.pop(INDEX_NAME, None)
    return tars or parquet or arrow


def _is_data(name: str) -> bool:
    is_devkit = fnmatch.fnmatch(name, _DEVKIT)
    return (name.endswith((*_TARS, ".parquet")) and not is_devkit) or re.search(_IMAGES, name) is not None


def _left_out(where: str, names: list[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (f"{where}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} ({len(names):,} in all) left out",)


def _list_of_split(folder: Storage, lists: list[str], split: str) -> str:
    wanted = words_of(split)
    chosen = [name for name in lists if wanted & set(re.split(r"[^a-z]+", name.rpartition("/")[2]))]
    if len(chosen) != 1:
        raise DatasetError(
            f"{folder} holds {len(chosen) or 'no'} lists of split {split} (of {', '.join(lists[:4])}); choose by "
            f"--split, or give the list itself as SRC, such as {folder}/{lists[0]}"
        )
    return chosen[0]


def _list_sources(folder: Storage, name: str, given: list[str] | None, labels: bool) -> Sources:
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
    found = list(annotations.labels.values()) if labels else [""] * len(paths)
    files = pa.table([paths, [sizes.get(path) for path in paths], found], schema=FILES)
    return Sources(folder, "listed", files, (given or annotations.classes) if labels else None)


def _container_sources(folder: Storage, sizes: dict[str, int], classes: list[str] | None, labels: bool) -> Sources:
    if compressed := [name for name in sizes if name.endswith(_COMPRESSED) or name.endswith("gz")]:
        raise DatasetError(f"{folder}/{compressed[0]} is compressed and has no random access; unpack it with gunzip")
    kinds = {name.rpartition(".")[2] for name in sizes}
    if kinds - {"tar", "parquet", "arrow"} or len(kinds) > 1:
        raise DatasetError(f"{folder}: SRC names {', '.join(sorted(sizes)[:3])}; use only .tar or only .parquet files")
    names = sorted(sizes)
    files = pa.table([names, [sizes[name] for name in names], [""] * len(names)], schema=FILES)
    if kinds == {"parquet"}:
        return Sources(folder, "parquet", files, classes)
    if kinds == {"arrow"}:
        return Sources(folder, "arrow", files, classes)
    if labels and any(name.rpartition("/")[2].startswith("ILSVRC2012_img_val") for name in names):
        devkits = fnmatch.filter(sorted(folder.names()), _DEVKIT)
        if not devkits:
            raise DatasetError(
                f"{folder}/{names[0]} holds no labels; put ILSVRC2012_devkit_t12.tar.gz, which holds them, next to it, "
                "or pack without labels (--no-labels)"
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
    """The files of `split`, which may lie in folders (`train/0.tar`); all if their names differ only in numbers."""
    groups = {_without_numbers(name) for name in sizes}
    in_folders = any("/" in name for name in sizes)
    split_words = set().union(*SPLITS.values())
    if len(groups) == 1 and not (in_folders and split_words & _words(next(iter(groups)))):
        return sizes
    wanted = words_of(split)
    # A folder of just that name counts more than one of its words in a name (`train` and `train_mini`).
    chosen = {name: size for name, size in sizes.items() if wanted & set(name.lower().split("/")[:-1])}
    chosen = chosen or {name: size for name, size in sizes.items() if wanted & _words(name)}
    if not chosen:
        raise DatasetError(
            f"{folder} holds {len(groups)} groups of files ({', '.join(sorted(groups)[:4])}), none of split {split}; "
            f"choose by --split or by a pattern, such as '{folder}/{min(sizes)[:8]}*'"
        )
    if len(folders := {_without_numbers(name).rpartition("/")[0] for name in chosen}) > 1:
        raise DatasetError(
            f"{folder} holds files of split {split} in {' and '.join(sorted(folders)[:3])}; give one of them as SRC"
        )
    return chosen


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def _without_numbers(path: str) -> str:
    """`path` with # for the numbers in the file's name and for folders that are only numbers: cifar10 is no number."""
    *folders, name = path.split("/")
    return "/".join([*("#" if folder.isdigit() else folder for folder in folders), re.sub(r"\d+", "#", name)])


def _matching_files(folder: Storage, patterns: str) -> dict[str, int]:
    """Files whose names match, after brace expansion; each expanded pattern must match a file."""
    present = {entry.name: entry.size for entry in folder.entries() if entry.is_file}
    found: dict[str, int] = {}
    for pattern in _expanded(patterns):
        names = fnmatch.filter(present, pattern)
        if not names:
            raise DatasetError(
                f"{folder}/{pattern}: no such file; SRC is a folder, a .tar or .parquet file or a pattern"
            )
        found |= {name: present[name] for name in names}
    return found


def _expanded(patterns: str) -> Iterator[str]:
    """Patterns without braces; a brace without its partner is a letter like any other."""
    if len(patterns) > 4096 or expanded_count(patterns) > MAX_EXPANDED:
        raise DatasetError(f"{patterns[:200]}: a pattern may stand for at most {MAX_EXPANDED:,} files")
    try:
        yield from braceexpand.braceexpand(patterns)
    except ValueError:  # UnbalancedBracesError
        yield patterns


def _size(where: Storage) -> int:
    return where.parent.open(where.name).size()


def _sources_at_any_depth(
    where: Storage, entries: list[Entry], split: str, classes: list[str] | None, labels: bool
) -> Sources:
    """Sources in a folder whose own files are no tars or tables: images in folders, or tars and tables in folders."""
    empty: list[str] = []
    tables = [_table([(entry.name, entry.size) for entry in entries if entry.is_file])]
    tables += [_table(list(_files_below(where, entry.name, 0, empty))) for entry in entries if not entry.is_file]
    files = pa.concat_tables(tables).combine_chunks()
    if not len(files):
        raise DatasetError(f"{where}: no images in it; SRC holds one folder of images per class, tars or Parquet files")
    parents = pc.replace_substring_regex(files["path"], r"(^|/)[^/]*$", "").combine_chunks().dictionary_encode()
    if found := _containers_in_folders(where, files, parents):
        chosen = _files_of_split(where, found, split)
        folder, above = where, {name.rpartition("/")[0] for name in chosen}
        if len(above) == 1:  # as if that folder were SRC
            folder = where.inside(inner := above.pop())
            chosen = {name[len(inner) + 1 :]: size for name, size in chosen.items()}
        return replace(_container_sources(folder, chosen, classes, labels), searched=where)
    return _folder_sources(where, files, parents, empty, split, classes, labels)


def _containers_in_folders(where: Storage, files: pa.Table, parents: pa.DictionaryArray) -> dict[str, int]:
    """Tars and tables in folders below `where`; none if they lie among images, which makes them unusable files."""
    if not pc.any(
        is_container := pc.match_substring_regex(files["path"], r"\.(tar|t?gz|tar\.\w+|parquet|arrow)$")
    ).as_py():
        return {}
    is_image = pc.match_substring_regex(files["path"], _IMAGES)
    with_images = set(parents.filter(is_image.combine_chunks()).unique().to_pylist())
    named = pc.or_(is_container, pc.ends_with(files["path"], "state.json"))
    found = _containers(where, dict(zip(*(files.filter(named)[n].to_pylist() for n in ("path", "size")), strict=True)))
    alone = [name for name in found if name.rpartition("/")[0] not in with_images]
    if alone and with_images:
        image = files["path"].filter(is_image)[0].as_py()
        raise DatasetError(f"{where} holds images ({image}) and {alone[0]}; give the folder of one of them as SRC")
    return found if alone else {}


def _folder_sources(
    where: Storage,
    files: pa.Table,
    parents: pa.DictionaryArray,
    empty: list[str],
    split: str,
    given: list[str] | None,
    labels: bool,
) -> Sources:
    """Images in class folders, of one split; `parents` are the folders of `files`, `empty` those without any file."""
    found = folder_classes(parents.dictionary.to_pylist(), split, str(where), wrapped=False)
    inside = f"{found.root}/".lstrip("/")
    for folder in empty if labels else ():
        name = folder.removeprefix(inside).split("/")[0]
        if folder.startswith(inside) and nfc(name) not in found.classes:
            raise DatasetError(f"{where}/{inside}{name}: this class folder holds no images; fill it or remove it")
    if labels and given is not None and (unknown := sorted(set(found.classes) - set(map(nfc, given)))):
        raise DatasetError(
            f"{where}/{inside}{unknown[0]} is not one of the {len(given)} classes in --classes; add it or rename the "
            "folder"
        )
    notices = _left_out(f"{where}, beside the splits", found.beside)
    names = parents.dictionary.to_pylist()
    if above := [name for name in names if name not in found.labels and (not name or inside.startswith(f"{name}/"))]:
        is_above = pc.is_in(parents.cast(pa.large_string()), pa.array(above, pa.large_string()))
        notices += _left_out(f"{where}, above the splits", files["path"].filter(is_above).to_pylist())
    label = pa.array(map(found.labels.get, names), pa.large_string()).take(parents.indices)
    files = files.set_column(2, FILES.field("class"), label if labels else pc.if_else(label.is_valid(), "", label))
    files = files.filter(label.is_valid())
    top = where
    if inside:  # as if that folder were SRC
        top = where.inside(found.root)
        files = files.set_column(0, FILES.field("path"), pc.utf8_slice_codeunits(files["path"], start=len(inside)))
    classes = (given or found.classes) if labels else None
    return Sources(top, "folders", files, classes, searched=where, notices=notices)


def _table(found: list[tuple[str, int]]) -> pa.Table:
    paths, sizes = zip(*found, strict=True) if found else ((), ())
    return pa.table([paths, sizes, [""] * len(found)], schema=FILES)


def _files_below(root: Storage, folder: str, depth: int, empty: list[str]) -> Iterator[tuple[str, int]]:
    """Path and size of each file below `folder`, at any depth; folders without any are added to `empty`."""
    if depth > 32:
        raise DatasetError(f"{root}/{folder}: 32 folders deep; remove any link that leads back to a folder above it")
    entries = root.entries(folder, skip=is_system)
    if not entries:
        empty.append(folder)
    for entry in entries:
        if entry.is_file:
            yield f"{folder}/{entry.name}", entry.size
        else:
            yield from _files_below(root, f"{folder}/{entry.name}", depth + 1, empty)
