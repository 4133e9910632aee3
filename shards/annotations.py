"""Lists of images with their labels, as iNaturalist and Places publish them next to the folders of their images.

iNaturalist 2017 to 2019 publish `train2018.json`, with `images`, `annotations` and `categories` as in COCO. Its file
names are relative to the list's folder (`train_val2018/Plantae/7477/x.jpg`). The lists of 2018 and 2019 hide the class
names; these come from `categories.json`, which was published later (github.com/visipedia/inat_comp). Places205 and
Places365 publish text files with the path and label of one image per line (github.com/zhoubolei/places_devkit).
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pyarrow.fs import FileType

from maelstream.shards.errors import DatasetError
from maelstream.shards.storage import Entry, Storage

_PUBLISHED = re.compile(r"(train|val|test)20\d\d\.json|(train|val)_places205\.csv|places365_\w+\.txt")
_PLACES205_LISTS = "trainvalsplit_places205"
_CATEGORIES = ("categories_places365.txt", "categoryIndex_places205.csv")
_PLACES205_IMAGES = ("data/vision/torralba/deeplearning/images256", "images256")
_LARGEST_ID = 99_999


@dataclass(frozen=True)
class Annotations:
    """The contents of a list."""

    root: str
    """The folder that the paths are relative to, below the list's own folder; "" if it is the same."""
    labels: dict[str, str]
    """Label of each image, a number in digits, by its path; "" without a label."""
    classes: list[str] | None
    """Class names by label; None if they are unknown."""


def published_lists(folder: Storage, entries: list[Entry]) -> list[str]:
    """Paths of the lists in `folder` that iNaturalist or Places published; `entries` are the contents of `folder`."""
    found = [entry.name for entry in entries if entry.is_file and _PUBLISHED.fullmatch(entry.name)]
    if any(entry.name == _PLACES205_LISTS and not entry.is_file for entry in entries):
        found += [f"{_PLACES205_LISTS}/{name}" for name in folder.names(_PLACES205_LISTS) if _PUBLISHED.fullmatch(name)]
    return sorted(found)


def is_list(name: str) -> bool:
    """Whether a file of this name can be such a list."""
    return name.endswith(".json") or _PUBLISHED.fullmatch(name) is not None


def list_from_image_root(folder: Storage, name: str) -> tuple[Storage, str]:
    """The folder that contains the images, and the list's path in it: Places205 has a separate folder for its lists."""
    return (folder.parent, f"{folder.name}/{name}") if folder.name == _PLACES205_LISTS else (folder, name)


def read_annotations(folder: Storage, name: str) -> Annotations:
    """Reads the list `folder`/`name`.

    Raises:
        DatasetError: it is not such a list, has an image twice or with two labels, or a path leads out of the folder.
    """
    annotations = _read_inaturalist(folder, name) if name.endswith(".json") else _read_places(folder, name)
    if not annotations.labels:
        raise DatasetError(f"{folder}/{name} lists no images")
    for path in annotations.labels:
        if path.startswith("/") or ".." in path.split("/"):
            raise DatasetError(f"{folder}/{name}: {path} leads out of the folder; correct the list")
    return annotations


# --- iNaturalist


def _read_inaturalist(folder: Storage, name: str) -> Annotations:
    where = f"{folder}/{name}"
    values = _load_json(folder, name)
    try:
        paths: dict[Any, str] = {}
        for image in values["images"]:
            if image["id"] in paths:
                raise DatasetError(f"{where} lists the image with id {image['id']} twice; correct the list")
            paths[image["id"]] = str(image["file_name"])
        labels = _empty_labels(where, paths.values())
        for annotation in values.get("annotations", []):
            if (path := paths.get(image_id := annotation["image_id"])) is None:
                raise DatasetError(f"{where} labels an image with id {image_id}, which it does not list")
            if labels[path]:
                raise DatasetError(f"{where} labels {path} twice; use a list with one label per image")
            labels[path] = str(int(annotation["category_id"]))
        categories = values.get("categories", [])
        if "categories.json" in folder.names():
            categories = _load_json(folder, "categories.json")
        names = {int(category["id"]): str(category["name"]) for category in categories}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(
            f"{where} is not a list of images in iNaturalist's format ({error!r}); such a list has `images` (id, "
            "file_name), `annotations` (image_id, category_id) and `categories` (id, name)"
        ) from None
    return Annotations("", labels, _class_names(where, names))


def _load_json(folder: Storage, name: str) -> Any:
    try:
        return json.loads(folder.read(name))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{folder}/{name} is not JSON ({error}); download it again") from None


def _class_names(where: str, names: dict[int, str]) -> list[str] | None:
    """Class names by label. A label without a name gets its number as name; equal names get their numbers appended."""
    if not names:
        return None
    if min(names) < 0 or max(names) > _LARGEST_ID:
        raise DatasetError(f"{where}: category ids go from {min(names)} to {max(names)}; labels are 0 to {_LARGEST_ID}")
    counts = Counter(names.values())
    names = {number: name if counts[name] == 1 else f"{name} {number}" for number, name in names.items()}
    return [names.get(number, str(number)) for number in range(max(names) + 1)]


# --- Places


def _read_places(folder: Storage, name: str) -> Annotations:
    where = f"{folder}/{name}"
    pairs = _read_pairs(folder, name)
    labels = _empty_labels(where, (path for path, _ in pairs))
    labels.update(pairs)
    above, _, _ = name.rpartition("/")
    categories = next((file for file in _CATEGORIES if file in folder.names(above)), None)
    if categories is not None:
        named = _read_pairs(folder, f"{above}/{categories}".lstrip("/"))
        names = {int(label): class_name for class_name, label in named if label}
    else:  # the images' folders, if every class has exactly one and they differ
        folders = {(label, path.rpartition("/")[0]) for path, label in pairs if label}
        names = {int(label): image_folder for label, image_folder in folders}
        if len(folders) > len(names) or len(set(names.values()) - {""}) < len(names):
            names = {}
    return Annotations(_image_folder(folder, name), labels, _class_names(where, names))


def _read_pairs(folder: Storage, name: str) -> list[tuple[str, str]]:
    """Path and label of each line; the labels are "" if no line has one. Paths are relative to the image folder."""
    try:
        lines = folder.read(name).decode().splitlines()
    except UnicodeDecodeError:
        raise DatasetError(f"{folder}/{name} is not text; download it again") from None
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, *label = line.rsplit(maxsplit=1)
        if label and not (label[0].isascii() and label[0].isdigit()):
            raise DatasetError(f"{folder}/{name}, line {number}: {line[:80]!r} is not 'path label'; correct it")
        if pairs and bool(label) != bool(pairs[0][1]):
            raise DatasetError(f"{folder}/{name}, line {number}: {line[:80]!r} has {'a' if label else 'no'} label")
        pairs.append((path.strip().removeprefix("/"), "".join(label)))
    return pairs


def _image_folder(folder: Storage, name: str) -> str:
    """The image folder: the one that the publisher's archives unpack to, or "" for the list's own folder."""
    words = re.split(r"[^a-z]+", name.rpartition("/")[2])
    if "205" in name:
        known: tuple[str, ...] = _PLACES205_IMAGES
    elif "train" in words:
        variants = ("", "_challenge" if "challenge" in words else "_standard")
        known = tuple(f"data_{size}{variant}" for size in ("256", "large") for variant in variants)
    else:
        known = tuple(f"{kind}_{size}" for kind in ("val", "test") if kind in words for size in ("256", "large"))
    found = [candidate for candidate in known if folder.inside(candidate).kind() == FileType.Directory]
    if len(found) > 1:
        raise DatasetError(
            f"{folder} holds {' and '.join(found)}; only one can have the images of {name}; move the others away"
        )
    return found[0] if found else ""


def _empty_labels(where: str, paths: Iterable[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for path in paths:
        if path in labels:
            raise DatasetError(f"{where} lists {path} twice; correct the list")
        labels[path] = ""
    return labels
