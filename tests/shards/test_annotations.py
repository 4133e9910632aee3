"""Miniature iNaturalist and Places sets in the folders and formats of their publishers.

Every year gives the same images and labels. Missing files are named; an image that is listed twice is an error.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from maelstream.jobs.command import run
from maelstream.shards.errors import DatasetError
from maelstream.shards.executors import Local
from maelstream.shards.pack import pack
from tests.shards.conftest import OPTIONS
from tests.shards.test_pack import digests
from tests.shards.test_sources import IMAGES, build, quarantine, samples_of

SPECIES = ["Lynx lynx", "Bufo bufo", "Parus major"]


def write(folder: Path, path: str, image: bytes) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(image)


def inaturalist(folder: Path, year: int) -> Path:
    """9 images for training (ids from 100, in no order), 3 for validation, of 3 species; 2018 hides their names."""
    supers = ["Mammalia", "Amphibia", "Aves"]
    categories: list[dict] = [
        {"id": k, "name": name if year == 2017 else f"{k}", "supercategory": supers[k]}
        for k, name in enumerate(SPECIES)
    ]
    root = "train_val_images" if year == 2017 else f"train_val{year}"
    for split, numbers in (("train", range(9)), ("val", range(9, 12))):
        images, labels = [], []
        for n in numbers:
            k = n % 3
            category = SPECIES[k] if year == 2017 else f"{k}"
            name = f"{root}/{supers[k]}/{category}/{n:032x}.jpg"
            write(folder, name, IMAGES[n])
            images.append({"id": 100 + n, "file_name": name, "width": 40 + n, "height": 30, "license": 1})
            labels.append({"id": n, "image_id": 100 + n, "category_id": k})
        listed = {"info": {"year": year}, "images": images, "annotations": labels[::-1], "categories": categories[::-1]}
        (folder / f"{split}{year}.json").write_text(json.dumps(listed))
    return folder


TRAIN = {IMAGES[n]: SPECIES[n % 3] for n in range(9)}


def changed(folder: Path, change: Callable[[dict], object], year: int = 2018) -> Path:
    path = inaturalist(folder, year) / f"train{year}.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return folder


def test_inaturalist_2017_gives_the_images_of_its_list_and_the_category_ids_as_labels(tmp_path: Path) -> None:
    source = inaturalist(tmp_path / "inat", 2017)
    (source / "train_2017_bboxes.json").write_text("{}")
    dataset = build(source, tmp_path / "out")
    assert dataset.classes == SPECIES and samples_of(dataset) == TRAIN
    assert "train_val_images/Amphibia/Bufo bufo/" in "".join(dataset.sources(np.arange(len(dataset))))
    assert samples_of(build(source, tmp_path / "val", "val")) == {IMAGES[n]: SPECIES[n % 3] for n in range(9, 12)}


@pytest.mark.parametrize("year", [2018, 2019])
def test_later_years_take_names_from_the_categories_published_afterwards(tmp_path: Path, year: int) -> None:
    source = inaturalist(tmp_path / "inat", year)
    dataset = build(source, tmp_path / "out")
    assert dataset.classes == ["0", "1", "2"] and samples_of(dataset) == {
        k: f"{n % 3}" for n, k in enumerate(IMAGES[:9])
    }
    names = [{"id": k, "name": name, "kingdom": "x"} for k, name in enumerate(SPECIES)]
    (source / "categories.json").write_text(json.dumps(names))
    assert samples_of(build(source, tmp_path / "named")) == TRAIN
    given = build(source / f"train{year}.json", tmp_path / "given", classes=["a", "b", "c"])
    assert given.classes == ["a", "b", "c"] and len(given) == 9


def test_labels_are_the_category_ids_if_names_repeat_or_ids_are_missing(tmp_path: Path) -> None:
    def change(values: dict) -> None:
        values["categories"] = [{"id": 0, "name": "Io"}, {"id": 4, "name": "Io"}, {"id": 2, "name": "Aa"}]
        for note in values["annotations"]:
            note["category_id"] = {0: 0, 1: 4, 2: 2}[note["category_id"]]

    dataset = build(changed(tmp_path / "inat", change), tmp_path / "out")
    assert dataset.classes == ["Io 0", "1", "Aa", "3", "Io 4"]
    assert sorted(dataset.label[:].tolist()) == [0] * 3 + [2] * 3 + [4] * 3


def test_a_test_list_without_annotations_is_unlabelled(tmp_path: Path) -> None:
    source = changed(tmp_path / "inat", lambda values: values.pop("annotations"))
    dataset = build(source, tmp_path / "out")
    assert samples_of(dataset) == dict.fromkeys(IMAGES[:9], "") and dataset.classes == []


def test_a_listed_file_that_is_missing_is_quarantined_and_is_an_error_with_strict(tmp_path: Path) -> None:
    source = inaturalist(tmp_path / "inat", 2018)
    gone = "train_val2018/Amphibia/1/" + f"{4:032x}.jpg"
    (source / gone).unlink()
    dataset = build(source, tmp_path / "out")
    assert len(dataset) == 8 and quarantine(tmp_path / "out") == {gone: "listed, but missing"}
    with pytest.raises(DatasetError, match=f"--strict: {gone} is unusable"):
        pack(str(source), str(tmp_path / "strict"), OPTIONS, Local(1), lambda _: None, strict=True)
    write(source, gone, IMAGES[4])  # the source has changed, so the finished dataset is not reused
    with pytest.raises(DatasetError, match="a source that has changed since"):
        build(source, tmp_path / "out")


def test_an_image_without_annotation_is_left_out_with_its_reason(tmp_path: Path) -> None:
    dataset = build(changed(tmp_path / "inat", lambda values: values["annotations"].pop()), tmp_path / "out")
    assert len(dataset) == 8 and set(quarantine(tmp_path / "out").values()) == {"no label, but others have one"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda v: v["annotations"].append(v["annotations"][0]), "labels train_val2018/.* twice"),
        (lambda v: v["images"].append(v["images"][0]), "lists the image with id 100 twice"),
        (lambda v: v["images"].append(v["images"][0] | {"id": 7}), "lists train_val2018/.*jpg twice"),
        (lambda v: v["annotations"].append({"image_id": 7, "category_id": 0}), "id 7, which it does not list"),
        (lambda v: v["annotations"][0].update(category_id=3), "label 3 is outside the classes, 0 to 2"),
        (lambda v: v["annotations"][0].update(category_id="lynx"), "is not a list of images in iNaturalist's format"),
        (lambda v: v.pop("images"), "is not a list of images in iNaturalist's format"),
        (lambda v: v["images"].clear() or v["annotations"].clear(), "lists no images"),
        (lambda v: v["images"][0].update(file_name="../x.jpg"), r"\.\./x.jpg leads out of the folder"),
        (lambda v: v["images"][0].update(file_name="/etc/x.jpg"), "/etc/x.jpg leads out of the folder"),
        (lambda v: v["categories"].append({"id": 10**6, "name": "x"}), "category ids go from 0 to 1000000"),
        (lambda v: [i.update(file_name="no" + i["file_name"]) for i in v["images"]], "none of the 9 images .*exists"),
    ],
)
def test_an_invalid_list_is_an_error_of_one_line(tmp_path: Path, change: Callable, complaint: str) -> None:
    with pytest.raises(DatasetError, match=complaint) as error:
        build(changed(tmp_path / "inat", change), tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "dataset.json").exists()


def test_the_list_of_the_split_is_chosen_and_several_or_none_are_an_error(tmp_path: Path) -> None:
    source = inaturalist(inaturalist(tmp_path / "inat", 2018), 2019)
    with pytest.raises(DatasetError, match=r"holds 2 lists of split train .*give the list itself"):
        build(source, tmp_path / "out")
    with pytest.raises(DatasetError, match="holds no lists of split test"):
        build(source, tmp_path / "out", "test")
    assert len(build(source / "train2019.json", tmp_path / "out")) == 9
    (source / "train2018.json").write_text("{")
    with pytest.raises(DatasetError, match=r"train2018\.json is not JSON"):
        build(source / "train2018.json", tmp_path / "bad")


# --- Places

SCENES = ["a/abbey", "a/airfield", "o/office/home"]


def places205(folder: Path) -> Path:
    for split, numbers in (("train", range(9)), ("val", range(9, 12))):
        lines = []
        for n in numbers:
            name = f"{SCENES[n % 3]}/gsun_{n:032x}.jpg"
            write(folder / "data/vision/torralba/deeplearning/images256", name, IMAGES[n])
            lines.append(f"{name} {n % 3}\n")
        path = folder / "trainvalsplit_places205" / f"{split}_places205.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(lines))
    return folder


def places365(folder: Path) -> Path:
    folder.mkdir()
    train = [f"/{SCENES[n % 3]}/{n:08d}.jpg" for n in range(9)]
    val = [f"Places365_val_{n:08d}.jpg" for n in range(9, 12)]
    test = ["Places365_test_00000001.jpg", "Places365_test_00000002.jpg"]
    for subfolder, names, images in (
        ("data_large", train, IMAGES),
        ("val_large", val, IMAGES[9:]),
        ("test_256", test, IMAGES),
    ):
        for name, image in zip(names, images, strict=False):
            write(folder, f"{subfolder}/{name}", image)
    (folder / "places365_train_standard.txt").write_text("".join(f"{p} {n % 3}\n" for n, p in enumerate(train)))
    (folder / "places365_val.txt").write_text("".join(f"{p} {n % 3}\n" for n, p in enumerate(val)))
    (folder / "places365_test.txt").write_text("\n".join(test))
    (folder / "categories_places365.txt").write_text("".join(f"/{p} {n}\n" for n, p in enumerate(SCENES)))
    return folder


SCENERY = {IMAGES[n]: SCENES[n % 3] for n in range(12)}


@pytest.mark.parametrize("make", [places205, places365])
def test_places_give_images_labels_and_class_names_in_both_splits(make: Callable[[Path], Path], tmp_path: Path) -> None:
    source = make(tmp_path / "places")
    train, val = build(source, tmp_path / "out"), build(source, tmp_path / "val", "val")
    assert train.classes == val.classes == SCENES
    assert samples_of(train) == {image: SCENERY[image] for image in IMAGES[:9]}
    assert samples_of(val) == {image: SCENERY[image] for image in IMAGES[9:]}


def test_a_places_list_can_be_the_source_and_its_test_list_has_no_labels(tmp_path: Path) -> None:
    source = places205(tmp_path / "places205") / "trainvalsplit_places205" / "train_places205.csv"
    assert samples_of(build(source, tmp_path / "out")) == {image: SCENERY[image] for image in IMAGES[:9]}
    tested = build(places365(tmp_path / "places365"), tmp_path / "test", "test")
    assert samples_of(tested) == dict.fromkeys(IMAGES[:2], "")


def test_easyformat_is_a_tree_of_class_folders(tmp_path: Path) -> None:
    root = tmp_path / "places365_standard"
    for n in range(6):
        write(root, f"train/{['airfield', 'abbey'][n % 2]}/{n:08d}.jpg", IMAGES[n])
    (root / "train.txt").write_text("train/airfield/00000000.jpg\n")
    dataset = build(root / "train", tmp_path / "out")
    assert samples_of(dataset) == {IMAGES[n]: ["airfield", "abbey"][n % 2] for n in range(6)}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/a/abbey/00000000.jpg 0", "lists a/abbey/00000000.jpg twice"),
        ("/a/abbey/x.jpg lynx", "line 10: '/a/abbey/x.jpg lynx' is not 'path label'"),
        ("/a/abbey/x.jpg", "line 10: '/a/abbey/x.jpg' has no label"),
        ("../x.jpg 0", r"\.\./x.jpg leads out of the folder"),
        ("/a/abbey/x.jpg 3", "label 3 is outside the classes, 0 to 2"),
    ],
)
def test_a_bad_line_of_a_places_list_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = places365(tmp_path / "places") / "places365_train_standard.txt"
    write(path.parent, "data_large/a/abbey/x.jpg", IMAGES[9])
    path.write_text(path.read_text() + line)
    with pytest.raises(DatasetError, match=complaint):
        build(path, tmp_path / "out")


def test_two_sizes_of_the_images_in_one_folder_are_an_error(tmp_path: Path) -> None:
    source = places365(tmp_path / "places")
    (source / "data_256").mkdir()
    with pytest.raises(DatasetError, match="holds data_256 and data_large; only one can have the images of"):
        build(source, tmp_path / "out")


# --- parts and restarts


def test_parts_and_restarts_give_the_bytes_of_one_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = inaturalist(tmp_path / "inat", 2018)
    (source / "train_val2018" / "Aves" / "2" / f"{2:032x}.jpg").unlink()
    options = ["--name", "inat", "--shard-size", "5KiB"]
    assert run("pack", [str(source), str(tmp_path / "one"), *options, "--workers", "1"]) == 0
    assert "8 samples" in capsys.readouterr().out
    for share in (["--part", "2/2"], []):  # the second call resumes where the first one stopped
        assert run("pack", [str(source), str(tmp_path / "two"), *options, *share, "--workers", "2"]) == 0
    assert len(list((tmp_path / "one").glob("*.tar"))) > 2
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    assert run("pack", [str(source / "train2018.json"), str(tmp_path / "two"), *options]) == 0  # the same source
    assert "0 built now" in capsys.readouterr().out
