"""Every layout of tars, folders and labels, packed and read back by webdataset, timm and ours.

Each layout writes its source with plain Python and returns the images and labels that a person would read from it.
"""

import io
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from timm.data import create_dataset

from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import DatasetError
from maelstream.shards.pack import Notice, index, pack
from maelstream.shards.plan import PackOptions
from maelstream.shards.reader import ShardReader
from tests.shards.test_pack import by_stock_dali
from tests.shards.test_sources import IMAGES, quarantine, tar_bytes, write_tar

MASK = io.BytesIO()
Image.fromarray(np.eye(30, dtype=np.uint8)).save(MASK, "PNG")
PNG = MASK.getvalue()

Sample = tuple[bytes, str]
"""An image and its class name; "" without a label."""


class InProcess:
    """Runs jobs one after another in this process: a worker takes two seconds to start."""

    def run(self, task: str, jobs: Iterable[Any]) -> Generator[Any, None, None]:
        module, name = task.split(":")
        yield from (getattr(import_module(module), name)(job) for job in jobs)


class Source(NamedTuple):
    """What a layout wrote."""

    path: Path | str
    samples: list[Sample]
    """The samples that SRC holds, by a plain reading."""
    options: dict[str, Any] | None = None
    """Options of `PackOptions`."""
    classes: list[str] | None = None
    """Class names that the user gives."""
    left_out: tuple[str, ...] = ()
    """Files that are quarantined."""
    notices: tuple[str, ...] = ()
    """Words of the notices."""


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def build(source: Source, destination: Path) -> tuple[Dataset, list[str]]:
    """The packed dataset, and the notices."""
    notices: list[str] = []
    options = replace(PackOptions("x", "train", 8000, 3), **(source.options or {}))

    def report(progress: object) -> None:
        if isinstance(progress, Notice):
            notices.append(progress)

    pack(str(source.path), str(destination), options, InProcess(), report, source.classes)
    return Dataset.open(destination), notices


def by_ours(dataset: Dataset) -> list[Sample]:
    images = ShardReader(dataset, check_crc=True).read(np.arange(len(dataset)))
    labels = [dataset.classes[label] if label >= 0 else "" for label in dataset.label[:]]
    return [(image.tobytes(), label) for image, label in zip(images, labels, strict=True)]


def by_webdataset(dataset: Dataset) -> list[Sample]:
    urls = [f"{dataset.folder}/{name}" for name in dataset.shard_names]
    found = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
        (image,) = (sample[extension] for extension in ("jpg", "png") if extension in sample)
        found.append((image, dataset.classes[int(sample["cls"])] if "cls" in sample else ""))
    return found


def pixels(image: Image.Image) -> bytes:
    return image.convert("RGB").tobytes()


def by_timm(dataset: Dataset) -> list[Sample]:
    """Pixels instead of files: timm decodes."""
    split = dataset.manifest["split"]
    read = create_dataset("wds/x", root=dataset.folder, split=split, is_training=False, batch_size=1)
    return [(pixels(image), dataset.classes[label]) for image, label in read]


# --- tars


def members(numbers: Iterable[int], prefix: str = "") -> list[tuple[str, bytes]]:
    return [
        m for n in numbers for m in ((f"{prefix}{n:04d}.jpg", IMAGES[n]), (f"{prefix}{n:04d}.cls", b"%d" % (n % 3)))
    ]


def numbered(numbers: Iterable[int]) -> list[Sample]:
    return [(IMAGES[n], str(n % 3)) for n in numbers]


def in_tar(folder: Path, content: list[tuple[str, bytes]]) -> Path:
    write_tar(folder / "photos.tar", content)
    return folder / "photos.tar"


def joined_tars(folder: Path) -> Source:
    put(folder / "a.tar", tar_bytes(members(range(4))) + tar_bytes(members(range(4, 9))) + tar_bytes(members([9])))
    return Source(folder / "a.tar", numbered(range(10)))


def padded_tar(folder: Path) -> Source:
    put(folder / "a.tar", tar_bytes(members(range(4))) + bytes(512 * 301))
    return Source(folder / "a.tar", numbered(range(4)))


IMAGENETTE = [
    (f"imagenette2/{split}/n0{n % 2}/n0{n % 2}_{n}.JPEG", IMAGES[n])
    for n in range(8)
    for split in [("train", "val")[n // 6]]
]


def imagenette(folder: Path) -> Source:
    path = in_tar(folder, [("imagenette2/noisy.csv", b"a,b"), *IMAGENETTE])
    samples = [(IMAGES[n], f"n0{n % 2}") for n in range(6)]
    return Source(path, samples, left_out=("photos.tar/imagenette2/noisy",), notices=("labels are the 2 folders",))


def imagenette_val(folder: Path) -> Source:
    return Source(in_tar(folder, IMAGENETTE), [(IMAGES[6], "n00"), (IMAGES[7], "n01")], {"split": "val"})


def cub(folder: Path) -> Source:
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "010.Red_winged"]
    content = [(f"CUB/images/{names[n % 3]}/{names[n % 3][4:]}_{n}.jpg", IMAGES[n]) for n in range(7)]
    path = in_tar(folder, [*content, ("CUB/classes.txt", b"1 a"), ("CUB/parts/parts.txt", b"1 a")])
    left_out = ("photos.tar/CUB/classes", "photos.tar/CUB/parts/parts")
    return Source(path, [(IMAGES[n], names[n % 3]) for n in range(7)], left_out=left_out)


def class_folders_with_dots_and_system_files(folder: Path) -> Source:
    content = [(f"./{kind}/IMG.{n}.jpg", IMAGES[n]) for n in range(6) for kind in [("cat", "dog")[n % 2]]]
    content += [(f"__MACOSX/{kind}/._IMG.0.jpg", b"x") for kind in ("cat", "dog")]
    content += [("./cat/._IMG.0.jpg", b"x"), ("./.DS_Store", b"x"), ("./dog/.ipynb_checkpoints/y.jpg", IMAGES[7])]
    return Source(in_tar(folder, content), [(IMAGES[n], ("cat", "dog")[n % 2]) for n in range(6)])


def class_folders_without_labels(folder: Path) -> Source:
    path = in_tar(folder, [(f"{n % 2}/{n}.jpg", IMAGES[n]) for n in range(4)])
    return Source(path, [(IMAGES[n], "") for n in range(4)], {"labels": False})


def webdataset_keys_with_slashes(folder: Path) -> Source:
    return Source(in_tar(folder, members(range(3), "a/x/") + members(range(3, 6), "b/y/")), numbered(range(6)))


def webdataset_captions_with_slashes(folder: Path) -> Source:
    content = [m for n in range(4) for m in ((f"{n % 2}/{n}.jpg", IMAGES[n]), (f"{n % 2}/{n}.txt", b"a cat"))]
    return Source(in_tar(folder, content), [(IMAGES[n], "") for n in range(4)])


def webdataset_json_with_slashes(folder: Path) -> Source:
    values = [3, 3.0, "+3", "03", " 3 ", True, [2], "1"]
    content = []
    for n, value in enumerate(values):
        content += [(f"{n % 2}/{n}.jpg", IMAGES[n]), (f"{n % 2}/{n}.json", json.dumps({"label": value}).encode())]
    return Source(in_tar(folder, content), list(zip(IMAGES, ["3"] * 5 + ["1", "2", "1"], strict=False)))


def names_with_dots(folder: Path) -> Source:
    content = [m for n in range(5) for m in ((f"IMG.{n}.jpg", IMAGES[n]), (f"IMG.{n}.cls", b"%d" % (n % 3)))]
    return Source(in_tar(folder, content), numbered(range(5)), notices=("each packed as a sample",))


def one_image_with_a_dot(folder: Path) -> Source:
    content = [m for n in range(4) for m in ((f"{n}.rgb.jpg", IMAGES[n]), (f"{n}.cls", b"%d" % (n % 3)))]
    return Source(in_tar(folder, content), numbered(range(4)))


def names_with_spaces(folder: Path) -> Source:
    return Source(in_tar(folder, members(range(4), "my photos/no ")), numbered(range(4)))


def mask_first(folder: Path) -> Source:
    content = [m for n in range(3) for m in ((f"{n:04d}.png", PNG), *members([n]))]
    return Source(in_tar(folder, content), numbered(range(3)), notices=("0000 (png, jpg: jpg is taken)",))


def mask_with_a_dot(folder: Path) -> Source:
    content = [m for n in range(3) for m in ((f"{n:04d}.seg.png", PNG), *members([n]))]
    return Source(in_tar(folder, content), numbered(range(3)), notices=("(seg.png, jpg: jpg is taken)",))


def image_field(folder: Path) -> Source:
    content = [m for n in range(3) for m in ((f"{n:04d}.seg.png", PNG), *members([n]))]
    return Source(in_tar(folder, content), [(PNG, str(n)) for n in range(3)], {"image_field": "seg.png"})


def label_extension(folder: Path) -> Source:
    content = [m for n in range(3) for m in (*members([n]), (f"{n:04d}.kind.txt", b"\xef\xbb\xbfcat %d\r\n" % n))]
    return Source(in_tar(folder, content), [(IMAGES[n], f"cat {n}") for n in range(3)], {"label_field": "kind.txt"})


def label_json_field(folder: Path) -> Source:
    content = [m for n in range(3) for m in (*members([n]), (f"{n:04d}.json", b'{"genus": "g%d"}' % n))]
    return Source(in_tar(folder, content), [(IMAGES[n], f"g{n}") for n in range(3)], {"label_field": "genus"})


def labels_of_minus_one(folder: Path) -> Source:
    content = [m for n in range(3) for m in ((f"{n}.jpg", IMAGES[n]), (f"{n}.cls", b"-1\n"))]
    return Source(in_tar(folder, content), [(IMAGES[n], "") for n in range(3)])


def some_labels_missing(folder: Path) -> Source:
    labels = [b'{"label": 0}', b'{"label": null}', b'{"label": [1, 2]}', b'{"label": -1}', b'{"label": NaN}']
    content = [m for n, text in enumerate(labels) for m in ((f"{n}.jpg", IMAGES[n]), (f"{n}.json", text))]
    left_out = tuple(f"photos.tar/{n}.jpg" for n in range(1, 5))
    notices = ("4 images left out, such as photos.tar/1.jpg", "--no-labels packs all images")
    return Source(in_tar(folder, content), [(IMAGES[0], "0")], left_out=left_out, notices=notices)


def labels_ignored(folder: Path) -> Source:
    labels = [b"0", b"\xff", b"-7", b"nan", b"cat"]
    content = [m for n, text in enumerate(labels) for m in ((f"{n}.jpg", IMAGES[n]), (f"{n}.cls", text))]
    return Source(in_tar(folder, content), [(IMAGES[n], "") for n in range(5)], {"labels": False})


def tars_in_folders(folder: Path) -> Source:
    write_tar(folder / "src" / "train" / "00000.tar", members(range(3)))
    write_tar(folder / "src" / "train" / "00001.tar", members(range(3, 6)))
    write_tar(folder / "src" / "val" / "00000.tar", members(range(6, 8)))
    put(folder / "src" / "README.md", b"x")
    return Source(folder / "src", numbered(range(6)))


# --- folders


def in_folders(folder: Path, paths: dict[str, bytes]) -> Path:
    for path, data in paths.items():
        put(folder / "src" / path, data)
    return folder / "src"


SYSTEM = dict.fromkeys(
    [
        *("__MACOSX/cat/._0.jpg", "cat/._0.jpg", ".DS_Store", "cat/Thumbs.db", "@eaDir/0.jpg/thumb.jpg", "desktop.ini"),
        *("cat/.ipynb_checkpoints/0.jpg", ".ipynb_checkpoints/0.jpg", "lost+found/0.jpg", "$RECYCLE.BIN/0.jpg"),
        *(".hidden/0.jpg", "dog/@eaDir/0.jpg"),
    ],
    b"x",
)


def splits(names: tuple[str, str], split: str, top: str = "", beside: bool = False) -> Callable[[Path], Source]:
    def layout(folder: Path) -> Source:
        paths = {
            f"{top}{names[n // 6]}/{kind}/{'young/' * (n % 3)}{n}.jpg": IMAGES[n]
            for n in range(9)
            for kind in [("cat", "dog")[n % 2]]
        }
        if beside:
            paths |= {"annotations/a.xml": b"x", "README.md": b"x"}
        wanted = range(6) if split == "train" else range(6, 9)
        notices = ("beside the splits: annotations", "above the splits: README.md") if beside else ()
        samples = [(IMAGES[n], ("cat", "dog")[n % 2]) for n in wanted]
        return Source(in_folders(folder, paths), samples, {"split": split}, notices=notices)

    return layout


def class_folders(folder: Path) -> Source:
    paths = {f"{('cat', 'dog')[n % 2]}/{n}.jpg": IMAGES[n] for n in range(6)}
    return Source(in_folders(folder, paths | SYSTEM), [(IMAGES[n], ("cat", "dog")[n % 2]) for n in range(6)])


def a_class_named_train(folder: Path) -> Source:
    paths = {f"{('bus', 'car', 'train')[n % 3]}/{n}.jpg": IMAGES[n] for n in range(6)}
    return Source(in_folders(folder, paths), [(IMAGES[n], ("bus", "car", "train")[n % 3]) for n in range(6)])


def splits_below_classes(folder: Path) -> Source:
    paths = {f"{('nut', 'pill')[n % 2]}/{('train', 'test')[n // 6]}/good/{n}.jpg": IMAGES[n] for n in range(8)}
    paths |= {"nut/ground_truth/0.jpg": PNG}
    return Source(in_folders(folder, paths), [(IMAGES[n], ("nut", "pill")[n % 2]) for n in range(6)])


def splits_without_classes(folder: Path) -> Source:
    paths = {f"{('train', 'val')[n // 4]}/{n}.jpg": IMAGES[n] for n in range(6)}
    return Source(in_folders(folder, paths), [(IMAGES[n], "") for n in range(4)])


def a_path_with_pattern_characters(folder: Path) -> Source:
    for n in range(4):
        put(folder / "photos [2023] {a}" / ("cat", "dog")[n % 2] / f"{n}.jpg", IMAGES[n])
    return Source(folder / "photos [2023] {a}", [(IMAGES[n], ("cat", "dog")[n % 2]) for n in range(4)])


def spellings_of_a_name(folder: Path) -> Source:
    spelled = {form: unicodedata.normalize(form, "müller") for form in ("NFC", "NFD")}
    paths = {f"{spelled['NFC']}/0.jpg": IMAGES[0], f"{spelled['NFD']}/1.jpg": IMAGES[1], "n/2.jpg": IMAGES[2]}
    names = [spelled["NFC"], spelled["NFC"], "n"]
    return Source(in_folders(folder, paths), list(zip(IMAGES, names, strict=False)), classes=["n", spelled["NFD"]])


def folders_without_labels(folder: Path) -> Source:
    path = in_folders(folder, {f"{'ab'[n % 2]}/{n}.jpg": IMAGES[n] for n in range(3)} | {"3.jpg": IMAGES[3]})
    (path / "empty").mkdir()
    return Source(path, [(IMAGES[n], "") for n in range(4)], {"labels": False})


def a_stray_tar_among_images(folder: Path) -> Source:
    path = in_folders(folder, {f"{'ab'[n % 2]}/{n}.jpg": IMAGES[n] for n in range(3)} | {"a/old.tar": tar_bytes([])})
    return Source(path, [(IMAGES[n], "ab"[n % 2]) for n in range(3)], left_out=("a/old.tar",))


# --- tables

NAMES = ["cat", "dog", "emu"]
CLASS_LABEL = {"names": NAMES, "_type": "ClassLabel"}
CARD = [{"name": "label", "dtype": {"class_label": {"names": {"1": "dog", "0": "cat"}}}}]


def table(labels: Any, feature: Any = None, first: int = 0, column: str = "label", features: Any = None) -> pa.Table:
    images = [{"bytes": IMAGES[first + n], "path": f"{n}.jpg"} for n in range(len(labels))]
    found = pa.table({"image": images, column: labels})
    if feature is not None:
        features = {"image": {"_type": "Image"}, column: feature}
    if features is not None:
        found = found.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return found


def parquet(
    found: Any,
    expected: list[str | None],
    feature: Any = None,
    features: Any = None,
    column: str = "label",
    **options: Any,
) -> Callable[[Path], Source]:
    """One Parquet file; `expected` is None for a row that is left out."""

    def layout(folder: Path) -> Source:
        pq.write_table(table(found, feature, column=column, features=features), folder / "a.parquet")
        samples = [(IMAGES[n], name) for n, name in enumerate(expected) if name is not None]
        left_out = tuple(f"a.parquet/{n}/{n}.jpg" for n, name in enumerate(expected) if name is None)
        return Source(folder / "a.parquet", samples, options, left_out=left_out)

    return layout


def repository(where: str, split: str = "train") -> Callable[[Path], Source]:
    """A Hugging Face repository; `where` holds the path of a split's file."""

    def layout(folder: Path) -> Source:
        for first, name in ((0, "train"), (3, "test"), (6, "validation")):
            path = folder / "hub" / where.format(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table([0, 1, 1], CLASS_LABEL, first), path)
        put(folder / "hub" / "README.md", b"a card")
        put(folder / "hub" / ".gitattributes", b"x")
        first = {"train": 0, "test": 3, "val": 6}[split]
        samples = [(IMAGES[first + n], NAMES[min(n, 1)]) for n in range(3)]
        return Source(folder / "hub", samples, {"split": split})

    return layout


def save_to_disk(folder: Path, found: pa.Table, files: int = 2, metadata: bool = True) -> None:
    """As `Dataset.save_to_disk` of Hugging Face's `datasets`."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{files:05d}.arrow" for n in range(files)]
    share = -(-len(found) // files)
    features = json.loads(found.schema.metadata[b"huggingface"])["info"]["features"]
    for n, name in enumerate(names):
        part = found.slice(n * share, share)
        part = part if metadata else part.replace_schema_metadata(None)
        with pa.ipc.new_stream(folder / name, part.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    put(folder / "state.json", json.dumps({"_data_files": [{"filename": name} for name in names]}).encode())
    put(folder / "dataset_info.json", json.dumps({"features": features}).encode())
    put(folder / "cache-1a2b.arrow", b"of a map()")


def saved_dataset(metadata: bool) -> Callable[[Path], Source]:
    def layout(folder: Path) -> Source:
        save_to_disk(folder / "saved", table([0, 1, 2, 1, 0], CLASS_LABEL), metadata=metadata)
        return Source(folder / "saved", [(IMAGES[n], NAMES[k]) for n, k in enumerate([0, 1, 2, 1, 0])])

    return layout


def saved_dataset_dict(folder: Path) -> Source:
    save_to_disk(folder / "saved" / "train", table([0, 1, 2, 1, 0], CLASS_LABEL))
    save_to_disk(folder / "saved" / "train_mini", table([0], CLASS_LABEL, 5), files=1)
    save_to_disk(folder / "saved" / "test", table([2, 2], CLASS_LABEL, 6), files=1)
    put(folder / "saved" / "dataset_dict.json", b'{"splits": ["train", "train_mini", "test"]}')
    return Source(folder / "saved", [(IMAGES[n], NAMES[k]) for n, k in enumerate([0, 1, 2, 1, 0])])


def arrow_file(folder: Path) -> Source:
    found = table([2, 0], CLASS_LABEL)
    with pa.ipc.new_file(folder / "a.arrow", found.schema) as writer:
        writer.write_table(found)
    return Source(folder / "a.arrow", [(IMAGES[0], "emu"), (IMAGES[1], "cat")])


def two_image_columns(folder: Path) -> Source:
    columns = {"mask": [PNG, PNG], "image": IMAGES[:2], "label": [0, 1]}
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return Source(folder / "a.parquet", list(zip(IMAGES, "01", strict=False)), notices=("image is taken",))


def image_column(folder: Path) -> Source:
    pq.write_table(pa.table({"photo": IMAGES[:2], "scan": [PNG, PNG], "kind": ["b", "a"]}), folder / "a.parquet")
    options = {"image_field": "photo", "label_field": "kind"}
    return Source(folder / "a.parquet", [(IMAGES[0], "b"), (IMAGES[1], "a")], options)


LAYOUTS: dict[str, Callable[[Path], Source]] = {
    layout.__name__: layout
    for layout in (
        *(joined_tars, padded_tar, imagenette, imagenette_val, cub, class_folders_with_dots_and_system_files),
        *(class_folders_without_labels, webdataset_keys_with_slashes, webdataset_captions_with_slashes),
        *(webdataset_json_with_slashes, names_with_dots, one_image_with_a_dot, names_with_spaces, mask_first),
        *(mask_with_a_dot, image_field, label_extension, label_json_field, labels_of_minus_one),
        *(some_labels_missing, labels_ignored, tars_in_folders, class_folders, a_class_named_train),
        *(splits_below_classes, splits_without_classes, a_path_with_pattern_characters, spellings_of_a_name),
        *(folders_without_labels, a_stray_tar_among_images, saved_dataset_dict, arrow_file, two_image_columns),
        image_column,
    )
} | {
    "train and val": splits(("train", "val"), "train"),
    "train and val, the latter": splits(("train", "val"), "val"),
    "Training and Validation": splits(("Training", "Validation"), "val"),
    "train2017 and val2017": splits(("train2017", "val2017"), "train"),
    "splits in a folder": splits(("train", "val"), "train", top="imagenette2/"),
    "splits and others": splits(("train", "valid"), "train", beside=True),
    "floats": parquet([0.0, 10.0, 2.0, None], ["0", "10", "2", None]),
    "fractions": parquet([0.0, 1.5, float("nan"), float("inf"), 1.0], ["0", None, None, None, "1"]),
    "minus one": parquet([0, -1, None, 2], ["0", None, None, "2"]),
    "no label at all": parquet([-1, -1], ["", ""]),
    "bool": parquet([True, False], ["1", "0"]),
    "text of numbers": parquet(["+1", "02", " 10", "3.0", ""], ["1", "2", "10", "3", None]),
    "names": parquet(["cat", "dog ", None], ["cat", "dog", None]),
    "dictionary": parquet(pa.array(["b", "a", "b"]).dictionary_encode(), ["b", "a", "b"]),
    "lists of one": parquet([[1], [0, 1], [], [2]], ["dog", None, None, "emu"], [CLASS_LABEL], column="labels"),
    "sequence": parquet([[1], [0]], ["dog", "cat"], {"feature": CLASS_LABEL, "_type": "Sequence"}),
    "features of a card": parquet([1, 0], ["dog", "cat"], features=CARD),
    "unusable labels": parquet([[1, 2], [3, 4]], ["", ""], labels=False),
    "data": repository("data/{}-00000-of-00001.parquet"),
    "configuration": repository("plain_text/{}-00000-of-00001.parquet", "val"),
    "converted": repository("default/{}/0000.parquet", "test"),
    "saved": saved_dataset(metadata=True),
    "saved, names next to it": saved_dataset(metadata=False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_packed_and_read_back_by_three_readers_equals_a_plain_reading(tmp_path: Path, layout: str) -> None:
    source = LAYOUTS[layout](tmp_path)
    dataset, notices = build(source, tmp_path / "out")
    assert Counter(by_ours(dataset)) == Counter(source.samples)
    assert Counter(by_webdataset(dataset)) == Counter(source.samples)
    if any(label for _, label in source.samples):  # timm reads labelled samples only
        expected = Counter((pixels(Image.open(io.BytesIO(image))), label) for image, label in source.samples)
        assert Counter(by_timm(dataset)) == expected
    assert set(quarantine(tmp_path / "out")) == set(source.left_out)
    for words in source.notices:
        assert any(words in notice for notice in notices), notices


# --- what cannot be read right is one line that says what to do


def refused(folder: Path, content: dict[str, bytes], **options: Any) -> Source:
    for path, data in content.items():
        put(folder / "src" / path, data)
    return Source(folder / "src", [], options)


def saved(folder: Path, change: Callable[[Path], object]) -> Source:
    save_to_disk(folder / "src", table([0, 1, 1], CLASS_LABEL))
    change(folder / "src")
    return Source(folder / "src", [])


def two_files(folder: Path, first: list[str], second: list[str]) -> Source:
    for n, names in enumerate((first, second)):
        pq.write_table(table([0, 1], {"names": names}, 2 * n), folder / f"train-{n}.parquet")
    return Source(folder, [])


def one_table(folder: Path, labels: Any, **options: Any) -> Source:
    pq.write_table(table(labels), folder / "a.parquet")
    return Source(folder / "a.parquet", [], options)


def shorten(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


TAR, OTHER = tar_bytes(members([0])), tar_bytes(members([1]))
REFUSED: dict[str, tuple[Callable[[Path], Source], str]] = {
    "no such split": (
        lambda f: refused(f, {"train/cat/0.jpg": IMAGES[0], "val/cat/1.jpg": IMAGES[1]}, split="test"),
        "src holds the splits train, val, and none is test; choose one by --split",
    ),
    "only another split": (
        lambda f: refused(f, {"val/cat/0.jpg": IMAGES[0]}),
        "src holds the splits val, and none is train; choose one by --split",
    ),
    "two folders of one split": (
        lambda f: refused(f, {"train/a/0.jpg": IMAGES[0], "val/a/1.jpg": PNG, "valid/a/2.jpg": PNG}, split="val"),
        "src holds val and valid, all of split val; give one of them as SRC",
    ),
    "no such split in a tar": (
        lambda f: refused(f, {"a.tar": tar_bytes(IMAGENETTE)}, split="test"),
        r"a\.tar/imagenette2 holds the splits train, val, and none is test; choose one by --split",
    ),
    "no such split of tars in folders": (
        lambda f: refused(f, {"train/0.tar": TAR, "val/0.tar": OTHER}, split="test"),
        r"2 groups of files \(train/#\.tar, val/#\.tar\), none of split test",
    ),
    "two configurations": (
        lambda f: refused(f, {"cifar10/train-0.tar": TAR, "cifar100/train-0.tar": OTHER}),
        "src holds files of split train in cifar10 and cifar100; give one of them as SRC",
    ),
    "images and tars": (
        lambda f: refused(f, {"cat/0.jpg": IMAGES[0], "old/a.tar": TAR}),
        r"src holds images \(cat/0\.jpg\) and old/a\.tar; give the folder of one of them as SRC",
    ),
    "compressed": (lambda f: refused(f, {"data/a.tar.gz": b"x"}), r"a\.tar\.gz is compressed"),
    "a field of folders": (
        lambda f: refused(f, {"cat/0.jpg": IMAGES[0]}, label_field="kind"),
        "src holds files of one image each; --image-field and --label-field are for others",
    ),
    "no such label": (
        lambda f: refused(f, {"a.tar": TAR}, label_field="lable"),
        "no sample has a label in lable, which --label-field names; correct it, or pack without labels",
    ),
    "no such image": (
        lambda f: refused(f, {"a.tar": TAR}, image_field="png"),
        r"none of 1 files is a usable image; the first, a\.tar/0000: no png in this sample, only cls, jpg; "
        "--image-field jpg takes that one",
    ),
    "no such column": (
        lambda f: one_table(f, [0, 1], image_field="photo"),
        r"a\.parquet: --image-field photo is no column of images; such are image of image, label",
    ),
    "bytes": (
        lambda f: one_table(f, [b"cat", b"dog"]),
        r"column label \(binary\) holds no labels, which are numbers or names; .*--label-field, .*--no-labels",
    ),
    "structs": (lambda f: one_table(f, [{"id": 1}, {"id": 2}]), r"column label \(struct<id: int64>\) holds no labels"),
    "only lists": (
        lambda f: one_table(f, [[0, 1], [1, 2]]),
        r"none of 2 files is a usable image; .*\(\[0, 1\] names several classes\); --no-labels packs without labels",
    ),
    "numbers and names": (
        lambda f: one_table(f, ["0", "cat"]),
        r"a\.parquet/1/1\.jpg: label cat is a name, but a\.parquet/0/0\.jpg has the number 0",
    ),
    "other classes": (
        lambda f: two_files(f, ["cat", "dog"], ["cat", "emu"]),
        r"train-0\.parquet and train-1\.parquet differ: class 1 is dog in the first and emu in the second; pack",
    ),
    "a folder that is no class": (
        lambda f: refused(f, {"cat/0.jpg": IMAGES[0], "dog/1.jpg": IMAGES[1]})._replace(classes=["cat", "emu"]),
        "src/dog is not one of the 2 classes in --classes; add it or rename the folder",
    ),
    "a cut stream": (
        lambda f: saved(f, lambda path: shorten(path / "data-00000-of-00002.arrow", 8)),
        r"data-00000-of-00002\.arrow is damaged or not an Arrow file \(its end is missing\)",
    ),
    "a missing file": (
        lambda f: saved(f, lambda path: (path / "data-00001-of-00002.arrow").unlink()),
        r"data-00001-of-00002\.arrow is missing, but listed in state\.json",
    ),
    "a damaged list": (lambda f: saved(f, lambda path: put(path / "state.json", b"{}")), r"state\.json is damaged"),
    "a damaged manifest": (lambda f: refused(f, {"a.tar": TAR, "dataset.json": b"{"}), r"dataset\.json is damaged"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_right_is_one_line_that_says_what_to_do(tmp_path: Path, kind: str) -> None:
    layout, complaint = REFUSED[kind]
    with pytest.raises(DatasetError, match=complaint) as error:
        build(layout(tmp_path), tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize("manifest", ['{"name": "birds"}', "[1, 2]", "3", '{"format_version": "1.0"}'])
def test_the_manifest_of_another_program_is_no_source_of_class_names(tmp_path: Path, manifest: str) -> None:
    source = refused(tmp_path, {"a.tar": TAR, "dataset.json": manifest.encode()})
    assert by_ours(build(source, tmp_path / "out")[0]) == numbered([0])


def test_a_packed_dataset_cannot_be_inside_the_folders_that_are_searched(tmp_path: Path) -> None:
    source = refused(tmp_path, {"train/0.tar": TAR, "val/0.tar": OTHER})
    with pytest.raises(DatasetError, match=r"packed is inside .*src, whose folders are classes; choose another DST"):
        build(source, tmp_path / "src" / "packed")


# --- adopting


def adopt(folder: Path, content: list[tuple[str, bytes]], **options: Any) -> tuple[Dataset, list[str]]:
    notices: list[str] = []
    write_tar(folder / "wds" / "a.tar", content)
    pack_options = replace(PackOptions("x", "train", 2**28, 0), **options)

    def report(progress: object) -> None:
        if isinstance(progress, Notice):
            notices.append(progress)

    index(str(folder / "wds"), pack_options, InProcess(), report)
    return Dataset.open(folder / "wds"), notices


def test_stock_dali_reads_adopted_shards_whose_names_have_spaces(tmp_path: Path) -> None:
    dataset, _ = adopt(tmp_path, members(range(3), "my photos/no\t1 "))
    assert by_ours(dataset) == by_webdataset(dataset) == numbered(range(3))
    images, labels = by_stock_dali(tmp_path / "wds", ["a.tar"], 3)
    assert images == IMAGES[:3] and labels == [b"0", b"1", b"2"]


def test_adopting_takes_the_image_that_other_readers_of_the_shards_know(tmp_path: Path) -> None:
    content = [("a.png", PNG), ("a.jpg", IMAGES[0]), ("b.rgb.jpg", IMAGES[1]), ("c.seg.png", PNG), ("c.jpg", IMAGES[2])]
    dataset, notices = adopt(tmp_path, content)
    assert by_ours(dataset) == [(IMAGES[0], ""), (IMAGES[2], "")]
    assert quarantine(tmp_path / "wds") == {
        "a.tar/b": "no image in this sample, only rgb.jpg; --image-field rgb.jpg takes that one"
    }
    assert len(notices) == 1 and "2 samples hold several images" in notices[0]
    dataset, notices = adopt(tmp_path / "other", content, image_field="seg.png")
    assert by_ours(dataset) == [(PNG, "")] and not notices
    assert (tmp_path / "other" / "wds" / "a.idx").read_text().split()[2] == "seg.png"
    with pytest.raises(DatasetError, match="--image-field my image: DALI cannot read extensions with spaces"):
        adopt(tmp_path / "third", content, image_field="my image")


def test_shards_are_adopted_without_labels(tmp_path: Path) -> None:
    others = [("x.jpg", IMAGES[5]), ("y.jpg", IMAGES[6]), ("y.cls", b"\xff")]
    dataset, _ = adopt(tmp_path, [*members(range(2)), *others], labels=False)
    assert by_ours(dataset) == [(IMAGES[n], "") for n in (0, 1, 5, 6)] and dataset.classes == []
    assert "cls" not in (tmp_path / "wds" / "a.idx").read_text()


def test_adopted_class_folders_are_labelled_and_their_splits_are_not_mixed(tmp_path: Path) -> None:
    dataset, notices = adopt(tmp_path, [(f"{('cat', 'dog')[n % 2]}/{n}.jpg", IMAGES[n]) for n in range(4)])
    assert by_ours(dataset) == [(IMAGES[n], ("cat", "dog")[n % 2]) for n in range(4)]
    assert "labels are the 2 folders of the images (cat, dog, ...)" in notices[0]
    with pytest.raises(DatasetError, match=r"a\.tar holds folders of several splits; pack it with --split"):
        adopt(tmp_path / "splits", IMAGENETTE)


def test_joined_tars_and_tars_in_folders_are_not_adopted(tmp_path: Path) -> None:
    put(tmp_path / "wds" / "a.tar", TAR + OTHER)
    options = PackOptions("x", "train", 2**28, 0)
    with pytest.raises(DatasetError, match="holds more after its end mark"):
        index(str(tmp_path / "wds"), options, InProcess(), lambda _: None)
    put(tmp_path / "deep" / "train" / "a.tar", TAR)
    with pytest.raises(DatasetError, match=r"deep has its tars in folders; index each of them, such as .*deep/train"):
        index(str(tmp_path / "deep"), options, InProcess(), lambda _: None)


def test_a_manifest_of_another_program_is_not_overwritten(tmp_path: Path) -> None:
    put(tmp_path / "wds" / "a.tar", TAR)
    put(tmp_path / "wds" / "dataset.json", b'{"name": "birds"}')
    options = PackOptions("x", "train", 2**28, 0)
    with pytest.raises(DatasetError, match=r"dataset\.json is no packed dataset's; rename it"):
        index(str(tmp_path / "wds"), options, InProcess(), lambda _: None)
    with pytest.raises(DatasetError, match="holds something else"):
        build(refused(tmp_path, {"cat/0.jpg": IMAGES[0]}), tmp_path / "wds")
    assert (tmp_path / "wds" / "dataset.json").read_bytes() == b'{"name": "birds"}'


@pytest.mark.parametrize("text", ["--5", "9" * 5000, "99999999999999999999", "inf"], ids=lambda text: text[:9])
def test_a_label_that_is_no_class_number_is_a_class_name(tmp_path: Path, text: str) -> None:
    source = Source(in_tar(tmp_path / "src", [("0.jpg", IMAGES[0]), ("0.cls", text.encode())]), [])
    dataset, _ = build(source, tmp_path / "out")
    assert by_ours(dataset) == [(IMAGES[0], text)]


@pytest.mark.parametrize("text", [b"\xed\xa0\x80", b"\xff"], ids=["surrogate", "no UTF-8"])
def test_a_label_that_is_no_text_quarantines_its_image(tmp_path: Path, text: bytes) -> None:
    content = [("0.jpg", IMAGES[0]), ("0.cls", text), ("1.jpg", IMAGES[1]), ("1.cls", b"3")]
    dataset, _ = build(Source(in_tar(tmp_path / "src", content), []), tmp_path / "out")
    assert by_ours(dataset) == [(IMAGES[1], "3")]
    (reason,) = quarantine(tmp_path / "out").values()
    assert reason.startswith("its label cannot be read")


def test_json_that_is_nested_too_deeply_has_no_label(tmp_path: Path) -> None:
    content = [("0.jpg", IMAGES[0]), ("0.json", b"[" * 100_000)]
    source = Source(in_tar(tmp_path / "src", content), [], options={"label_field": "label"})
    with pytest.raises(DatasetError, match="no sample has a label in label, which --label-field names"):
        build(source, tmp_path / "out")
