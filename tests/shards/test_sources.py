"""Every kind of source gives the same images, bytes and labels, and damaged files are named."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from scipy.io import savemat

from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import DatasetError
from maelstream.shards.executors import Local
from maelstream.shards.pack import pack
from maelstream.shards.plan import PackOptions
from maelstream.shards.reader import ShardReader
from maelstream.shards.sources import _matching_files
from maelstream.shards.storage import Storage
from tests.conftest import encoded, photograph

IMAGES = [encoded(photograph(40 + number, 30, seed=number), "JPEG").tobytes() for number in range(12)]
Samples = dict[bytes, str]
"""Class name of each image, by its bytes."""


def build(source: Path | str, destination: Path | str, split: str = "train", **options: object) -> Dataset:
    classes = options.pop("classes", None)
    pack_options = PackOptions("tiny", split, 8_000, 3, **options)  # type: ignore[arg-type]
    pack(str(source), str(destination), pack_options, Local(2), lambda _: None, classes)  # type: ignore[arg-type]
    return Dataset.open(destination)


def samples_of(dataset: Dataset) -> Samples:
    read = ShardReader(dataset, check_crc=True).read(np.arange(len(dataset)))
    return {
        data.tobytes(): dataset.classes[label] if label >= 0 else ""
        for data, label in zip(read, dataset.label[:], strict=True)
    }


def quarantine(folder: Path) -> dict[str, str]:
    """Reasons by source."""
    lines = (folder / "quarantine.jsonl").read_text().splitlines()
    return {line["source"]: line["reason"] for line in map(json.loads, lines)}


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))


# --- ILSVRC2012 as downloaded

# By ILSVRC2012_ID from 1: not in the order of the WordNet ids; a parent synset that is not a class is in the list.
WNIDS = ["n02119789", "n01440764", "n03100240"]


@pytest.fixture
def ilsvrc(tmp_path: Path) -> Path:
    """A train tar of 2 images per class, a validation tar of 6 images, and the devkit."""
    folder = tmp_path / "ilsvrc"
    classes = [
        (f"{wnid}.tar", tar_bytes((f"{wnid}_{n}.JPEG", IMAGES[2 * k + n]) for n in range(2)))
        for k, wnid in enumerate(WNIDS)
    ]
    write_tar(folder / "ILSVRC2012_img_train.tar", classes)
    validation = [(f"ILSVRC2012_val_{n + 1:08d}.JPEG", IMAGES[6 + n]) for n in range(6)]
    write_tar(folder / "ILSVRC2012_img_val.tar", validation)
    rows: list[tuple] = [(k + 1, wnid, "words", "gloss", 0, [], 0, 2) for k, wnid in enumerate(WNIDS)]
    rows.append((4, "n00001740", "entity", "gloss", 3, [1, 2, 3], 2, 0))
    names = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, [(name, object) for name in names])[:, None]})
    truth = b"3\n1\n2\n2\n3\n1\n"  # by ILSVRC2012_ID
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        for name, data in (
            ("data/meta.mat", meta.getvalue()),
            ("data/ILSVRC2012_validation_ground_truth.txt", truth),
        ):
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder


def test_the_ilsvrc_train_tar_holds_one_tar_per_class(ilsvrc: Path, tmp_path: Path) -> None:
    dataset = build(ilsvrc, tmp_path / "out")
    assert dataset.classes == sorted(WNIDS)
    assert samples_of(dataset) == {IMAGES[2 * k + n]: wnid for k, wnid in enumerate(WNIDS) for n in range(2)}
    source = f"ILSVRC2012_img_train.tar/{WNIDS[0]}.tar/{WNIDS[0]}_0.JPEG"
    assert source in dataset.sources(np.arange(len(dataset)))


def test_ilsvrc_validation_labels_are_devkit_numbers_not_sorted_names(ilsvrc: Path, tmp_path: Path) -> None:
    dataset = build(ilsvrc, tmp_path / "out", "val")
    assert dataset.classes == sorted(WNIDS)  # the train split's numbers
    expected = [WNIDS[2], WNIDS[0], WNIDS[1], WNIDS[1], WNIDS[2], WNIDS[0]]
    assert samples_of(dataset) == dict(zip(IMAGES[6:], expected, strict=True))


def test_one_ilsvrc_tar_alone_is_a_source(ilsvrc: Path, tmp_path: Path) -> None:
    assert len(build(ilsvrc / "ILSVRC2012_img_val.tar", tmp_path / "out", "val")) == 6


def test_the_validation_tar_without_its_devkit_or_with_another_one_is_an_error(ilsvrc: Path, tmp_path: Path) -> None:
    devkit = ilsvrc / "ILSVRC2012_devkit_t12.tar.gz"
    whole = devkit.read_bytes()
    devkit.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=r"devkit_t12\.tar\.gz is damaged or not a devkit"):
        build(ilsvrc, tmp_path / "out", "val")
    devkit.unlink()
    with pytest.raises(DatasetError, match=r"put ILSVRC2012_devkit_t12\.tar\.gz, which holds them, next to it"):
        build(ilsvrc, tmp_path / "out", "val")
    devkit.write_bytes(whole)
    write_tar(ilsvrc / "ILSVRC2012_img_val.tar", [("ILSVRC2012_val_00000007.JPEG", IMAGES[0])])
    with pytest.raises(DatasetError, match="is not one of the 6 images in the devkit"):
        build(ilsvrc, tmp_path / "out", "val")


# --- WebDataset


def webdataset_members(first: int, count: int) -> list[tuple[str, bytes]]:
    return [
        member
        for n in range(first, first + count)
        for member in ((f"{n:04d}.jpg", IMAGES[n]), (f"{n:04d}.cls", str(n % 4).encode()), (f"{n:04d}.json", b"{}"))
    ]


@pytest.fixture
def webdataset_folder(tmp_path: Path) -> Path:
    """Two train shards of 4 samples, one validation shard of 2, as timm publishes them."""
    folder = tmp_path / "wds"
    write_tar(folder / "imagenet1k-train-0000.tar", webdataset_members(0, 4))
    write_tar(folder / "imagenet1k-train-0001.tar", webdataset_members(4, 4))
    write_tar(folder / "imagenet1k-validation-00.tar", webdataset_members(8, 2))
    return folder


TRAIN = {IMAGES[n]: str(n % 4) for n in range(8)}


@pytest.mark.parametrize("pattern", ["", "/imagenet1k-train-{0000..0001}.tar", "/*train*.tar"])
def test_webdataset_shards_are_chosen_by_split_or_by_a_pattern(
    webdataset_folder: Path, tmp_path: Path, pattern: str
) -> None:
    dataset = build(f"{webdataset_folder}{pattern}", tmp_path / "out")
    assert samples_of(dataset) == TRAIN
    assert "imagenet1k-train-0001.tar/0005.jpg" in dataset.sources(np.arange(8))
    samples = webdataset.WebDataset(
        [str(path) for path in sorted(webdataset_folder.glob("*train*"))], shardshuffle=False, empty_check=False
    )
    assert {sample["jpg"]: sample["cls"].decode() for sample in samples} == TRAIN


def test_the_validation_shards_are_split_val(webdataset_folder: Path, tmp_path: Path) -> None:
    assert samples_of(build(webdataset_folder, tmp_path / "out", "val")) == {IMAGES[8]: "0", IMAGES[9]: "1"}


def test_the_error_for_an_unknown_split_lists_the_files(webdataset_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"2 groups of files \(imagenet#k-train-#\.tar, .*none of split minival"):
        build(webdataset_folder, tmp_path / "out", "minival")


def test_a_brace_pattern_with_a_missing_file_is_an_error(webdataset_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"imagenet1k-train-0002\.tar: no such file; SRC is"):
        build(f"{webdataset_folder}/imagenet1k-train-{{0000..0002}}.tar", tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "option", "expected"),
    [
        ([{"label": 1}, {"label": 0}], None, ["1", "0"]),
        ([{"class_id": 1}, {"class_id": 0}], None, ["1", "0"]),
        ([{"label": "tench"}, {"label": "cock"}], None, ["tench", "cock"]),
        ([{"label": 9, "genus": "b"}, {"label": 9, "genus": "a"}], "genus", ["b", "a"]),
        ([{"size": 3}, {"size": 4}], None, ["", ""]),
    ],
)
def test_the_class_can_be_in_a_json_field(
    tmp_path: Path, fields: list[dict], option: str | None, expected: list[str]
) -> None:
    members = []
    for n, values in enumerate(fields):
        members += [(f"{n}.json", json.dumps(values).encode()), (f"{n}.jpg", IMAGES[n])]
    write_tar(tmp_path / "a.tar", members)
    dataset = build(tmp_path / "a.tar", tmp_path / "out", label_field=option)
    assert samples_of(dataset) == dict(zip(IMAGES, expected, strict=False))
    assert dataset.classes == sorted(set(expected) - {""})


def test_png_and_webp_samples_and_long_names_are_read(tmp_path: Path) -> None:
    png, webp = encoded(photograph(), "PNG").tobytes(), encoded(photograph(), "WEBP").tobytes()
    deep = "folder/" * 20 + "a"  # more than the 100 characters of a plain header
    write_tar(tmp_path / "a.tar", [("./b.png", png), ("./b.cls", b"0"), (f"{deep}.webp", webp), (f"{deep}.cls", b"1")])
    dataset = build(tmp_path / "a.tar", tmp_path / "out")
    assert samples_of(dataset) == {png: "0", webp: "1"}


def test_invalid_samples_are_quarantined_with_their_reasons(tmp_path: Path) -> None:
    members = [
        ("good.jpg", IMAGES[0]),
        ("good.cls", b"3"),
        ("textonly.txt", b"hello"),
        ("README", b"hello"),
        ("nolabel.jpg", IMAGES[1]),
        ("broken.json", b"{"),
        ("broken.jpg", IMAGES[2]),
        ("odd.json", b'{"label": 1.5}'),
        ("odd.jpg", IMAGES[3]),
        ("cut.jpg", IMAGES[4][:200]),
        ("cut.cls", b"1"),
    ]
    write_tar(tmp_path / "a.tar", members)
    dataset = build(tmp_path / "a.tar", tmp_path / "out")
    assert samples_of(dataset) == {IMAGES[0]: "3"}
    reasons = quarantine(tmp_path / "out")
    for name, reason in {
        "textonly": "no image in this sample, only txt",
        "README": "its name has no extension",
        "nolabel.jpg": "no label, but others have one",
        "broken.jpg": "its label cannot be read",
        "odd.jpg": "1.5 is neither a number nor a name",
        "cut.jpg": "cannot be decoded",
    }.items():
        assert reason in reasons.pop(f"a.tar/{name}")
    assert not reasons


def test_class_names_are_read_from_a_list_or_from_a_packed_folder(webdataset_folder: Path, tmp_path: Path) -> None:
    names = ["tench", "goldfish", "shark", "hen"]
    dataset = build(webdataset_folder, tmp_path / "out", classes=names)
    assert samples_of(dataset) == {image: names[int(label)] for image, label in TRAIN.items()}
    assert build(tmp_path / "out", tmp_path / "again").classes == names


def test_labels_outside_the_classes_are_an_error(webdataset_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"0003\.jpg: label 3 is outside the classes, 0 to 2"):
        build(webdataset_folder, tmp_path / "out", classes=["a", "b", "c"])
    for label in ("-2", "999999999"):
        write_tar(tmp_path / "a.tar", [("x.jpg", IMAGES[0]), ("x.cls", label.encode())])
        with pytest.raises(DatasetError, match=f"label {label} is outside the classes"):
            build(tmp_path / "a.tar", tmp_path / label)


def link(name: str, kind: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    return buffer.getvalue()


SOUND = tar_bytes(webdataset_members(0, 4))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (tar_bytes([("../x.jpg", IMAGES[0])]), "member ../x.jpg leads out of the folder"),
        (tar_bytes([("a/../../x.jpg", IMAGES[0])]), "leads out of the folder"),
        (tar_bytes([("/etc/x.jpg", IMAGES[0])]), "leads out of the folder"),
        (link("x.jpg", tarfile.SYMTYPE), "member x.jpg is a link or a device"),
        (link("x.jpg", tarfile.LNKTYPE), "member x.jpg is a link or a device"),
        (link("x.jpg", tarfile.CHRTYPE), "member x.jpg is a link or a device"),
        (tar_bytes([("x.jpg", IMAGES[0]), ("x.JPG", IMAGES[1])]), "x.JPG: duplicate file name"),
        (tar_bytes([("x.jpg", IMAGES[0]), ("y.jpg", IMAGES[1]), ("x.jpg", IMAGES[2])]), "two samples have the key x"),
        (SOUND[: SOUND.index(b"0001.jpg")], "is truncated or damaged at byte"),  # between two members
        (SOUND[: SOUND.index(b"0001.jpg") + 700], "is truncated inside 0001.jpg"),
        (SOUND.replace(b"0001.cls", b"\xff001.cls"), "is truncated or damaged at byte"),
        (b"", "is damaged or not a tar"),
        (b"hello" * 1000, "is damaged or not a tar"),
        (bytes(10240), "contains no files"),
    ],
)
def test_a_bad_tar_is_named_and_nothing_is_packed(tmp_path: Path, data: bytes, complaint: str) -> None:
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(DatasetError) as error:
        build(tmp_path / "bad.tar", tmp_path / "out")
    assert complaint in str(error.value) and "bad.tar" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_bad_member_of_a_nested_tar_is_named(tmp_path: Path) -> None:
    inner = tar_bytes([("n01_1.JPEG", IMAGES[0]), ("../n01_2.JPEG", IMAGES[1])])
    write_tar(tmp_path / "outer.tar", [("n01.tar", inner)])
    with pytest.raises(DatasetError, match=r"outer\.tar/n01\.tar: member \.\./n01_2\.JPEG leads out"):
        build(tmp_path / "outer.tar", tmp_path / "out")
    write_tar(tmp_path / "cut.tar", [("n01.tar", inner[:700]), ("n02.tar", inner)])
    with pytest.raises(DatasetError, match=r"cut\.tar/n01\.tar is truncated"):
        build(tmp_path / "cut.tar", tmp_path / "cut")


def test_compressed_tars_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.tar.gz").write_bytes(b"")
    with pytest.raises(DatasetError, match="is compressed"):
        build(tmp_path / "src", tmp_path / "out")


# --- Parquet


def write_parquet(path: Path, columns: dict[str, list], names: list[str] | None = None, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)


def test_hugging_face_parquet_files_give_images_labels_and_class_names(tmp_path: Path) -> None:
    names = ["tench", "goldfish", "shark"]
    for file in range(2):
        images = [{"bytes": IMAGES[4 * file + n], "path": f"n{n}.JPEG"} for n in range(4)]
        path = tmp_path / "hub" / "data" / f"train-{file:05d}-of-00002.parquet"
        write_parquet(path, {"image": images, "label": [0, 1, 2, 1]}, names, row_group_size=2)
    write_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", {"image": images, "label": [-1] * 4})
    (tmp_path / "hub" / "README.md").write_text("a dataset card")
    dataset = build(tmp_path / "hub", tmp_path / "out")
    assert dataset.classes == names
    assert samples_of(dataset) == {IMAGES[4 * f + n]: names[[0, 1, 2, 1][n]] for f in range(2) for n in range(4)}
    assert "train-00001-of-00002.parquet/2/n2.JPEG" in dataset.sources(np.arange(8))
    unlabelled = build(tmp_path / "hub", tmp_path / "test", "test")
    assert samples_of(unlabelled) == dict.fromkeys(IMAGES[4:8], "")
    assert not (tmp_path / "out" / ".pack").exists()


def test_plain_columns_and_string_labels_are_read_from_parquet(tmp_path: Path) -> None:
    columns: dict[str, list] = {"jpg": IMAGES[:3], "kind": ["b", "a", "b"], "width": [1, 2, 3]}
    write_parquet(tmp_path / "a.parquet", columns)
    dataset = build(tmp_path / "a.parquet", tmp_path / "out", label_field="kind")
    assert dataset.classes == ["a", "b"] and samples_of(dataset) == dict(zip(IMAGES, "bab", strict=False))


def test_parquet_files_without_images_are_an_error(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": ["a"], "label": [1]})
    with pytest.raises(DatasetError, match="which column holds the image"):
        build(tmp_path / "a.parquet", tmp_path / "out")
    write_parquet(tmp_path / "b.parquet", {"image": [IMAGES[0]]})
    with pytest.raises(DatasetError, match="has no column kind"):
        build(tmp_path / "b.parquet", tmp_path / "out2", label_field="kind")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-9])
    with pytest.raises(DatasetError, match="is damaged or not a Parquet file"):
        build(tmp_path / "c.parquet", tmp_path / "out3")


# --- folders


def test_images_outside_class_folders_are_unlabelled_or_left_out(tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for n in range(3):
        (flat / f"{n}.jpg").write_bytes(IMAGES[n])
    dataset = build(flat, tmp_path / "out")
    assert samples_of(dataset) == dict.fromkeys(IMAGES[:3], "") and dataset.label[:].tolist() == [-1] * 3
    (flat / "class").mkdir()
    (flat / "class" / "x.jpg").write_bytes(IMAGES[3])
    dataset = build(flat, tmp_path / "other")
    assert samples_of(dataset) == {IMAGES[3]: "class"}
    assert quarantine(tmp_path / "other") == {f"{n}.jpg": "no label, but others have one" for n in range(3)}


def test_links_to_folders_are_followed_and_a_circular_link_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jpg").write_bytes(IMAGES[0])
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "class").symlink_to(tmp_path / "elsewhere")
    assert samples_of(build(tmp_path / "src", tmp_path / "out")) == {IMAGES[0]: "class"}
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match="remove any link that leads back"):
        build(tmp_path / "src", tmp_path / "circle")


def test_a_name_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "src" / "class").mkdir(parents=True)
    (tmp_path / "src" / "class" / b"\xff.jpg".decode("utf-8", "surrogateescape")).write_bytes(IMAGES[0])
    with pytest.raises(DatasetError, match="the name is not UTF-8"):
        build(tmp_path / "src", tmp_path / "out")


@pytest.mark.parametrize("name", ["a{-0.tar", "a}-0.tar", "a{b,c-0.tar"])
def test_a_single_brace_in_a_name_is_a_letter(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert list(_matching_files(Storage.at(tmp_path), name.replace("0", "*"))) == [name]
    with pytest.raises(DatasetError, match="no such file"):
        _matching_files(Storage.at(tmp_path), f"no{name}")


@pytest.mark.parametrize(
    "pattern", ["a-{0..99999999999}.tar", "{0..9999}/{0..9999}.tar", "a-{5..-99999999}.tar", "{a,b}" * 30]
)
def test_a_pattern_of_too_many_files_is_an_error_before_it_is_expanded(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(DatasetError, match="at most 1,000,000 files"):
        _matching_files(Storage.at(tmp_path), pattern)
