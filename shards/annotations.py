"""Lists of images with their labels, as iNaturalist and Places publish them next to the folders of their images.

iNaturalist 2017 to 2019: `train2018.json`, with `images`, `annotations` and `categories` as in COCO, whose file names
lead from the list's folder (`train_val2018/Plantae/7477/x.jpg`); the names that 2018 and 2019 hid are taken from the
`categories.json` that was published later. Places205 and Places365: a line an image, path and label
(github.com/visipedia/inat_comp, github.com/zhoubolei/places_devkit).
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
    """The folder that the paths lead from, below that of the list; "" where it is the same."""
    labels: dict[str, str]
    """Label of each image, a number, by its path; "" without one."""
    classes: list[str] | None
    """Names by label."""


def published_lists(folder: Storage, entries: list[Entry]) -> list[str]:
    """Paths of the lists in `folder`, which holds `entries`, that iNaturalist or Places publish."""
    found = [entry.name for entry in entries if entry.is_file and _PUBLISHED.fullmatch(entry.name)]
    if any(entry.name == _PLACES205_LISTS and not entry.is_file for entry in entries):
        found += [f"{_PLACES205_LISTS}/{name}" for name in folder.names(_PLACES205_LISTS) if _PUBLISHED.fullmatch(name)]
    return sorted(found)


def is_list(name: str) -> bool:
    """Whether a file that the user names can be such a list."""
    return name.endswith(".json") or _PUBLISHED.fullmatch(name) is not None


def from_above(folder: Storage, name: str) -> tuple[Storage, str]:
    """The folder that images lie below, and the list from there: Places205 puts its lists into one of their own."""
    return (folder.parent, f"{folder.name}/{name}") if folder.name == _PLACES205_LISTS else (folder, name)


def read_annotations(folder: Storage, name: str) -> Annotations:
    """The list `folder`/`name`.

    Raises:
        DatasetError: not such a list; an image twice or with two labels; a path that leads out of the folder.
    """
    read = _read_json(folder, name) if name.endswith(".json") else _read_lines(folder, name)
    if not read.labels:
        raise DatasetError(f"{folder}/{name} lists no images")
    for path in read.labels:
        if path.startswith("/") or ".." in path.split("/"):
            raise DatasetError(f"{folder}/{name}: {path} leads out of the folder; mend the list")
    return read


# --- iNaturalist


def _read_json(folder: Storage, name: str) -> Annotations:
    where = f"{folder}/{name}"
    values = _json(folder, name)
    try:
        paths: dict[Any, str] = {}
        for image in values["images"]:
            if image["id"] in paths:
                raise DatasetError(f"{where} lists the image with id {image['id']} twice; mend the list")
            paths[image["id"]] = str(image["file_name"])
        labels = _unlabelled(where, paths.values())
        for note in values.get("annotations", []):
            if (path := paths.get(note["image_id"])) is None:
                raise DatasetError(f"{where} labels an image with id {note['image_id']}, which it does not list")
            if labels[path]:
                raise DatasetError(f"{where} labels {path} twice; take a list of one label an image")
            labels[path] = str(int(note["category_id"]))
        categories = values.get("categories", [])
        if "categories.json" in folder.names():
            categories = _json(folder, "categories.json")
        names = {int(category["id"]): str(category["name"]) for category in categories}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(
            f"{where} is no list of images as iNaturalist has them ({error!r}); it holds `images` (id, file_name), "
            "`annotations` (image_id, category_id) and `categories` (id, name)"
        ) from None
    return Annotations("", labels, _by_number(where, names))


def _json(folder: Storage, name: str) -> Any:
    try:
        return json.loads(folder.read(name))
    except ValueError as error:
        raise DatasetError(f"{folder}/{name} is not JSON ({error}); fetch it again") from None


def _by_number(where: str, names: dict[int, str]) -> list[str] | None:
    """Class names by label: a number without a name is called by it, and so are species of one name."""
    if not names:
        return None
    if min(names) < 0 or max(names) > _LARGEST_ID:
        raise DatasetError(f"{where}: category ids go from {min(names)} to {max(names)}; labels are 0 to {_LARGEST_ID}")
    counts = Counter(names.values())
    names = {number: name if counts[name] == 1 else f"{name} {number}" for number, name in names.items()}
    return [names.get(number, str(number)) for number in range(max(names) + 1)]


# --- Places


def _read_lines(folder: Storage, name: str) -> Annotations:
    where = f"{folder}/{name}"
    pairs = _pairs(folder, name)
    labels = _unlabelled(where, (path for path, _ in pairs))
    labels.update(pairs)
    above, _, _ = name.rpartition("/")
    beside = next((file for file in _CATEGORIES if file in folder.names(above)), None)
    if beside is not None:
        names = {int(label): path for path, label in _pairs(folder, f"{above}/{beside}".lstrip("/")) if label}
    else:  # the folder that all images of a class lie in, if it is one
        folders = {(label, path.rpartition("/")[0]) for path, label in pairs if label}
        names = {int(label): place for label, place in folders}
        if len(folders) > len(names) or len(set(names.values()) - {""}) < len(names):
            names = {}
    return Annotations(_images_of(folder, name), labels, _by_number(where, names))


def _pairs(folder: Storage, name: str) -> list[tuple[str, str]]:
    """Path, from the folder of images, and label of each line; all with a label or all without ("")."""
    try:
        lines = folder.read(name).decode().splitlines()
    except UnicodeDecodeError:
        raise DatasetError(f"{folder}/{name} is no text; fetch it again") from None
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, *label = line.rsplit(maxsplit=1)
        if label and not (label[0].isascii() and label[0].isdigit()):
            raise DatasetError(f"{folder}/{name}, line {number}: {line[:80]!r} is not like 'path label'; mend it")
        if pairs and bool(label) != bool(pairs[0][1]):
            raise DatasetError(f"{folder}/{name}, line {number}: {line[:80]!r} has {'a' if label else 'no'} label")
        pairs.append((path.strip().removeprefix("/"), "".join(label)))
    return pairs


def _images_of(folder: Storage, name: str) -> str:
    """The folder of the images: that which the publisher's archives make, or the list's own."""
    words = re.split(r"[^a-z]+", name.rpartition("/")[2])
    if "205" in name:
        known: tuple[str, ...] = _PLACES205_IMAGES
    elif "train" in words:
        variants = ("", "_challenge" if "challenge" in words else "_standard")
        known = tuple(f"data_{size}{variant}" for size in ("256", "large") for variant in variants)
    else:
        known = tuple(f"{kind}_{size}" for kind in ("val", "test") if kind in words for size in ("256", "large"))
    found = [place for place in known if folder.inside(place).kind() == FileType.Directory]
    if len(found) > 1:
        raise DatasetError(
            f"{folder} holds {' and '.join(found)}; which of them has the images of {name}? Move the others away"
        )
    return found[0] if found else ""


def _unlabelled(where: str, paths: Iterable[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for path in paths:
        if path in labels:
            raise DatasetError(f"{where} lists {path} twice; mend the list")
        labels[path] = ""
    return labels
