"""`maelstream pack`, `info` and `demo` on the command line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from maelstream.jobs.command import COMMANDS, run
from maelstream.jobs.demo import photographs, write_crops
from maelstream.jobs.packing.options import default_name
from maelstream.shards.dataset import Dataset
from tests.conftest import write_images


def test_pack_prints_its_result_and_info_describes_the_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / "flowers", classes=2, per_class=4)
    (images / "class01" / "broken.jpg").write_bytes(b"no image")
    assert run("pack", [str(images), str(tmp_path / "out"), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "8 samples in 1 shards (1 built now), 1 files quarantined" in printed and "quarantine.jsonl" in printed
    assert run("info", [str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    for fact in ("flowers / train", "8", "2, 4 to 4 samples each", "jpg 8", "resolutions"):
        assert fact in table


def test_without_a_terminal_one_line_per_shard_shows_rate_time_left_and_quarantine_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / "flowers", classes=2, per_class=10)
    (images / "class01" / "broken.jpg").write_bytes(b"no image")
    assert run("pack", [str(images), str(tmp_path / "out"), "--workers", "1", "--shard-size", "20000"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    count = len(Dataset.open(tmp_path / "out").shard_names)
    assert len(lines) == count > 2
    for number, line in enumerate(lines, 1):
        assert re.fullmatch(
            rf"{number}/{count} shards: flowers-train-\d{{6}}\.tar: \d+ images, [\d,]+ images/s, [\d.]+ MiB/s, "
            r"[01] quarantined, \d+:\d\d left",
            line,
        )
    assert lines[-1].endswith("1 quarantined, 0:00 left") and "20 samples" in last


def test_info_lists_quarantine_reasons_and_draws_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "flowers", classes=2, per_class=4)
    for number in range(3):
        (images / "class01" / f"broken{number}.jpg").write_bytes(b"no image")
    assert run("pack", [str(images), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert run("info", [str(tmp_path / "out"), "--plot", str(tmp_path / "info.png")]) == 0
    table = capsys.readouterr().out
    assert "not an image" in table and "class01/broken0.jpg" in table
    with Image.open(tmp_path / "info.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(10**6) or []) > 20
    assert run("info", [str(tmp_path / "out"), "--plot", str(tmp_path / "info.xyz")]) == 2
    assert "info.xyz cannot be written" in capsys.readouterr().err


def test_info_reports_that_images_have_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "src", classes=1, per_class=4) / "class00"
    assert run("pack", [str(images), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert run("info", [str(tmp_path / "out"), "--plot", str(tmp_path / "info.png")]) == 0
    assert "none: no labels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("src", "name"),
    [
        ("data/imagenet/train", "imagenet"),
        ("imagenet1k-train-{0000..1023}.tar", "imagenet1k"),
        ("s3://bucket/wds/imagenet1k-validation-{00..63}.tar?region=eu", "imagenet1k"),
        ("hub/cifar10/data", "cifar10"),
        ("my photos", "my-photos"),
    ],
)
def test_a_dataset_is_named_after_its_source(src: str, name: str) -> None:
    assert default_name(src) == name


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--quality", "90"], "--quality 90: 1 to 100, and with --resize"),
        (["--resize", "0"], "--resize 0 is no length"),
        (["--resize", "64", "--quality", "0"], "--quality 0: 1 to 100"),
        (["--workers", "0"], "--workers 0: at least one"),
        (["--name", "a/b"], "--name a/b"),
        (["--classes", "nowhere.txt"], "--classes nowhere.txt cannot be read"),
        (["--no-labels", "--label-field", "kind"], "--no-labels: omit --classes and --label-field"),
    ],
)
def test_invalid_options_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    images = write_images(tmp_path / "src", classes=1, per_class=1)
    assert run("pack", [str(images), str(tmp_path / "out"), *options]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_class_names_of_an_editor_on_windows_are_read_and_a_repeated_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / "src", classes=2, per_class=1)
    names = tmp_path / "names.txt"
    names.write_bytes("\ufeffclass01\r\nclass00\r\nno\u0308ne\r\n".encode())
    options = ["--classes", str(names), "--workers", "1"]
    assert run("pack", [str(images), str(tmp_path / "out"), *options]) == 0
    assert Dataset.open(tmp_path / "out").classes == ["class01", "class00", "n\u00f6ne"]
    names.write_text("class01\nn\u00f6ne\nno\u0308ne\n")
    assert run("pack", [str(images), str(tmp_path / "other"), *options]) == 2
    assert "or repeated, as line 3 (n\u00f6ne) is" in capsys.readouterr().err


def test_images_without_labels_are_named_and_packed_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / "src", classes=2, per_class=2)
    (images / "cover.jpg").write_bytes((images / "class00" / "000.jpg").read_bytes())
    assert run("pack", [str(images), str(tmp_path / "out"), "--workers", "1"]) == 0
    note = "note: 1 images left out, such as cover.jpg: no label, but others have one; --no-labels packs all images"
    assert note in capsys.readouterr().err
    assert run("pack", [str(images), str(tmp_path / "all"), "--workers", "1", "--no-labels"]) == 0
    assert not capsys.readouterr().err
    dataset = Dataset.open(tmp_path / "all")
    assert (len(dataset), dataset.label[:].tolist(), dataset.classes) == (5, [-1] * 5, [])


def test_the_demo_packs_several_hundred_varied_crops_of_real_photographs(tmp_path: Path) -> None:
    write_crops(tmp_path / "crops", per_photograph=20, seed=0)
    assert run("pack", [str(tmp_path / "crops"), str(tmp_path / "out"), "--workers", "1"]) == 0
    dataset = Dataset.open(tmp_path / "out")
    assert len(dataset) == 20 * len(photographs()) == 260
    assert len(set(zip(dataset.width[:].tolist(), dataset.height[:].tolist(), strict=True))) > 200


def test_the_demo_deletes_only_files_of_an_earlier_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert run("demo", ["--out", str(tmp_path)]) == 2
    assert "holds files that no demo wrote" in capsys.readouterr().err
    (tmp_path / "images").mkdir()
    assert run("demo", ["--src", str(tmp_path / "images"), "--out", str(tmp_path)]) == 2
    assert "which the demo empties" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def no_images(folder: Path) -> str:
    (folder / "src").mkdir()
    return "no images in it"


def no_folder(folder: Path) -> str:
    return "no such folder"


def empty_class(folder: Path) -> str:
    write_images(folder / "src", classes=2, per_class=1)
    (folder / "src" / "class09").mkdir()
    return "class09: this class folder holds no images"


def unreadable_file(folder: Path) -> str:
    write_images(folder / "src", classes=1, per_class=2)
    (folder / "src" / "class00" / "gone.jpg").symlink_to("nowhere.jpg")
    return "gone.jpg cannot be read (No such file or directory)"


def nothing_usable(folder: Path) -> str:
    (folder / "src" / "a").mkdir(parents=True)
    (folder / "src" / "a" / "b.jpg").write_bytes(b"no image")
    return "none of 1 files is a usable image; the first, a/b.jpg: not an image"


def destination_is_a_file(folder: Path) -> str:
    write_images(folder / "src", classes=1, per_class=1)
    (folder / "out").write_text("a file")
    return "out is a file"


def destination_below_a_file(folder: Path) -> str:
    write_images(folder / "src", classes=1, per_class=1)
    (folder / "file").write_text("a file")
    (folder / "out").symlink_to(folder / "file" / "out")
    return "out cannot be created"


@pytest.mark.parametrize(
    "prepare",
    [
        destination_below_a_file,
        no_images,
        no_folder,
        empty_class,
        unreadable_file,
        nothing_usable,
        destination_is_a_file,
    ],
)
def test_bad_input_is_an_error_of_one_line_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: object
) -> None:
    complaint = prepare(tmp_path)  # type: ignore[operator]
    assert run("pack", [str(tmp_path / "src"), str(tmp_path / "out"), "--workers", "1"]) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.startswith("maelstream pack: ") and printed.count("\n") == 1


def test_a_destination_among_the_class_folders_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "src", classes=1, per_class=1)
    assert run("pack", [str(images), str(images / "packed")]) == 2
    assert "whose folders are classes; choose another DST" in capsys.readouterr().err
    assert not (images / "packed").exists()


@pytest.mark.parametrize("size", ["0", "many", "12XB", "-3"])
def test_an_invalid_shard_size_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str) -> None:
    images = write_images(tmp_path / "src", classes=1, per_class=1)
    assert run("pack", [str(images), str(tmp_path / "out"), f"--shard-size={size}"]) == 2
    assert "is no size; write 256MiB" in capsys.readouterr().err


def maelstream(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", "from maelstream.jobs.command import main; main()", *args],
        capture_output=True,
        text=True,
    )


def test_help_lists_every_command() -> None:
    done = maelstream("--help")
    assert done.returncode == 0 and all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_own_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(command, ["--help"])
    assert ended.value.code == 0 and f"usage: maelstream {command}" in capsys.readouterr().out


def test_the_error_for_an_unknown_command_lists_the_known_ones() -> None:
    done = maelstream("bake")
    assert done.returncode == 2 and "no command 'bake'; one of pack, index, info" in done.stderr
