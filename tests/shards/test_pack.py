"""Packing gives the same bytes for any workers and after any interruption.

Unusable files are quarantined with a reason, and none is dropped silently. Other readers of the shards get the same
samples.
"""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import webdataset
from nvidia.dali import Pipeline, fn
from PIL import Image

from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import DatasetError
from maelstream.shards.executors import Local
from maelstream.shards.pack import PackResult, pack
from maelstream.shards.plan import PackOptions
from maelstream.shards.reader import ShardReader
from tests.conftest import encoded, photograph, write_images
from tests.shards.conftest import OPTIONS


def build(source: Path, destination: Path, workers: int = 1, options: PackOptions = OPTIONS) -> PackResult:
    return pack(str(source), str(destination), options, Local(workers), lambda _: None)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_image_is_packed_once_with_its_bytes_label_size_and_checksum(images: Path, built: Path) -> None:
    dataset = Dataset.open(built)
    samples = np.arange(len(dataset))
    sources = dataset.sources(samples)
    assert sorted(sources) == sorted(path.relative_to(images).as_posix() for path in images.glob("*/*.jpg"))
    for sample, source, data in zip(samples, sources, ShardReader(dataset, check_crc=True).read(samples), strict=True):
        original = (images / source).read_bytes()
        assert data.tobytes() == original
        assert dataset.classes[dataset.label[sample]] == source.split("/")[0]
        assert (dataset.width[sample], dataset.height[sample]) == Image.open(images / source).size
        assert dataset.size[sample] == len(original) and dataset.crc32c[sample] == google_crc32c.value(original)


def test_the_bytes_do_not_depend_on_the_number_of_workers(images: Path, built: Path, tmp_path: Path) -> None:
    assert build(images, tmp_path / "other", workers=3).built > 3
    assert digests(tmp_path / "other") == digests(built)


def test_the_order_is_shuffled_by_the_seed(images: Path, built: Path, tmp_path: Path) -> None:
    build(images, tmp_path / "other", options=PackOptions("tiny", "train", 30_000, seed=4))
    orders = [Dataset.open(folder).sources(np.arange(48)) for folder in (built, tmp_path / "other")]
    assert orders[0] != orders[1] != sorted(orders[0])
    assert sorted(orders[0]) == sorted(orders[1])


@pytest.mark.parametrize("wait_for", ["000000.tar", "000002.tar", "000004.idx"])
def test_a_build_that_is_killed_and_started_again_gives_the_same_bytes(
    images: Path, built: Path, tmp_path: Path, wait_for: str
) -> None:
    destination = tmp_path / "killed"
    script = (
        "import sys; from maelstream.shards.executors import Local; from maelstream.shards.pack import pack\n"
        "from maelstream.shards.plan import PackOptions\n"
        "if __name__ == '__main__':\n"
        "    pack(*sys.argv[1:], PackOptions('tiny', 'train', 30_000, 3), Local(1), lambda _: None)\n"
    )
    (tmp_path / "build.py").write_text(script)
    command = [sys.executable, str(tmp_path / "build.py"), str(images), str(destination)]
    process = subprocess.Popen(command, start_new_session=True)
    while process.poll() is None and not (destination / f"tiny-train-{wait_for}").exists():
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in destination.glob("*.tar")}
    receipts = {path.stem.removeprefix("shard-") for path in destination.glob(".pack/shard-*.arrow")}
    build(images, destination, workers=2)
    assert digests(destination) == digests(built)
    for number in receipts:  # finished shards are not built again
        name = f"tiny-train-{number}.tar"
        assert (destination / name).stat().st_mtime_ns == finished[name]


def test_a_shard_that_is_deleted_before_the_end_is_built_again(images: Path, built: Path, tmp_path: Path) -> None:
    destination, every = tmp_path / "out", len(Dataset.open(built).shard_names)
    assert pack(str(images), str(destination), OPTIONS, Local(1), lambda _: None, part=(1, 2)).missing == every // 2
    (destination / "tiny-train-000002.tar").unlink()
    assert build(images, destination).built == every // 2 + 1
    assert digests(destination) == digests(built)


def test_a_finished_dataset_is_not_built_again(images: Path, built: Path) -> None:
    before = digests(built)
    assert build(images, built).built == 0
    assert digests(built) == before


def test_a_destination_with_other_files_is_an_error(images: Path, built: Path, tmp_path: Path) -> None:
    before = digests(built)
    with pytest.raises(DatasetError, match="holds something else"):
        build(images, built, options=PackOptions("tiny", "train", 30_000, seed=99))
    assert digests(built) == before
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DatasetError, match="holds something else"):
        build(images, tmp_path)


def unusable_files(folder: Path) -> dict[str, str]:
    """Writes unusable files into `folder` and returns the expected reason for each."""
    image = Image.open(io.BytesIO((folder / "class00" / "000.jpg").read_bytes()))
    whole = (folder / "class00" / "000.jpg").read_bytes()
    image.save(folder / "class00" / "gif.jpg", "GIF")
    image.save(folder / "class00" / "scan.tiff")
    for name, data in {
        "empty.jpg": b"",
        "text.jpg": b"<html>404</html>",
        "cut.jpg": whole[: len(whole) // 2],
        "header.jpg": whole[:300],
        "notes.txt": b"taken in 2009",
    }.items():
        (folder / "class00" / name).write_bytes(data)
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    (folder / "class00" / "bomb.png").write_bytes(bomb.getvalue())
    return {
        "bomb.png": "Image size",
        "cut.jpg": "truncated",
        "empty.jpg": "empty file",
        "gif.jpg": "a GIF file",
        "header.jpg": "",
        "notes.txt": "not an image",
        "scan.tiff": "a TIFF file",
        "text.jpg": "not an image",
    }


def test_unusable_files_are_listed_with_their_reasons(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", classes=2, per_class=3)
    expected = unusable_files(images)
    result = build(images, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert (result.samples, result.quarantined) == (6, len(expected))
    assert [line["source"] for line in lines] == [f"class00/{name}" for name in sorted(expected)]
    for line in lines:
        assert expected[Path(line["source"]).name] in line["reason"]
        assert line["reason"]


def test_unusual_images_are_packed_and_their_content_decides_the_extension(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "all"
    folder.mkdir(parents=True)
    picture = Image.effect_noise((33, 21), 80)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.convert("RGB").save(folder / "png.JPEG", "PNG")
    picture.convert("CMYK").save(folder / "cmyk.jpg", "JPEG")
    picture.save(folder / "gray.jpg", "JPEG", progressive=True)
    picture.convert("P").save(folder / "palette.png", "PNG")
    picture.convert("RGB").save(folder / "turned.jpg", "JPEG", exif=exif)
    picture.convert("RGB").save(folder / "web.jpg", "WEBP")
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save(folder / "deep.png", "PNG")
    picture.resize((1, 1)).save(folder / "one.jpg", "JPEG")
    build(tmp_path / "images", tmp_path / "out")
    dataset = Dataset.open(tmp_path / "out")
    samples = np.arange(len(dataset))
    with tarfile.open(tmp_path / "out" / dataset.shard_names[0]) as tar:
        extensions = {name.split(".")[0]: name.split(".")[1] for name in tar.getnames() if not name.endswith("cls")}
    found = dict(zip(dataset.sources(samples), [extensions[key] for key in dataset.keys(samples)], strict=True))
    assert found == {
        "all/png.JPEG": "png",
        "all/cmyk.jpg": "jpg",
        "all/gray.jpg": "jpg",
        "all/palette.png": "png",
        "all/turned.jpg": "jpg",
        "all/web.jpg": "webp",
        "all/deep.png": "png",
        "all/one.jpg": "jpg",
    }
    turned = dataset.sources(samples).index("all/turned.jpg")
    assert (dataset.width[turned], dataset.height[turned]) == (33, 21)  # as stored; the orientation is ignored


def test_tars_are_plain_ustar_without_owner_or_time(built: Path) -> None:
    for path in built.glob("*.tar"):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert all((m.mtime, m.uid, m.gid, m.uname, m.gname) == (0, 0, 0, "", "") for m in members)
        assert path.read_bytes()[257:263] == b"ustar\0"


def test_webdataset_reads_the_same_samples(built: Path) -> None:
    dataset = Dataset.open(built)
    expected = ShardReader(dataset, check_crc=True).read(np.arange(len(dataset)))
    urls = [str(built / name) for name in dataset.shard_names]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == dataset.keys(np.arange(len(dataset)))
    assert [sample["jpg"] for sample in samples] == [data.tobytes() for data in expected]
    assert [int(sample["cls"]) for sample in samples] == dataset.label[:].tolist()


def by_stock_dali(folder: Path, names: list[str], count: int) -> tuple[list[bytes], list[bytes]]:
    """Images and labels of the first `count` samples, read by DALI's own reader with our `.idx` files."""
    pipeline = Pipeline(count, 1, device_id=None)
    with pipeline:
        jpg, cls = fn.readers.webdataset(  # type: ignore[misc]
            paths=[str(folder / name) for name in names],
            index_paths=[str((folder / name).with_suffix(".idx")) for name in names],
            ext=["jpg", "cls"],
        )
        pipeline.set_outputs(jpg, cls)
    pipeline.build()
    images, labels = pipeline.run()
    return [bytes(images.at(k)) for k in range(count)], [bytes(labels.at(k)) for k in range(count)]


def test_stock_dali_reads_the_same_samples_with_the_idx_files(built: Path) -> None:
    dataset = Dataset.open(built)
    images, labels = by_stock_dali(built, dataset.shard_names, len(dataset))
    expected = ShardReader(dataset, check_crc=False).read(np.arange(len(dataset)))
    assert images == [data.tobytes() for data in expected]
    assert list(map(int, labels)) == dataset.label[:].tolist()


def test_timm_reads_the_folder_as_it_is(built: Path) -> None:
    from timm.data import create_dataset

    dataset = Dataset.open(built)
    by_timm = create_dataset("wds/tiny", root=str(built), split="train", is_training=False, batch_size=1)
    labels = [label for _, label in by_timm]
    assert len(by_timm) == len(dataset) and labels == dataset.label[:].tolist()


def test_a_full_disk_is_one_clear_error_and_finished_shards_are_kept(images: Path, tmp_path: Path) -> None:
    """A limit on file size simulates the full disk; one shard, which holds a large image, exceeds it."""
    shutil.copytree(images, tmp_path / "images")
    noise = Image.effect_noise((400, 400), 80)
    for number in range(50):  # until the large image is in a late shard
        name = tmp_path / "images" / "class00" / f"large{number}.jpg"
        noise.save(name, quality=90)
        build(tmp_path / "images", tmp_path / f"built{number}")
        built = Dataset.open(tmp_path / f"built{number}")
        full = int(np.argmax([shard["bytes"] for shard in built.manifest["shards"]]))
        if 3 <= full < len(built.shard_names) - 1:
            break
        name.unlink()
    script = (
        "import resource, signal, sys; from maelstream.jobs.command import run\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)\n"
        "    options = ['--name', 'tiny', '--shard-size', '30000', '--seed', '3', '--workers', '1']\n"
        "    sys.exit(run('pack', [sys.argv[1], sys.argv[2], *options]))\n"
    )
    (tmp_path / "build.py").write_text(script)
    command = [sys.executable, str(tmp_path / "build.py"), str(tmp_path / "images"), str(tmp_path / "out")]
    done = subprocess.run([*command, "80000"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{built.shard_names[full]} cannot be written (File too large)" in done.stderr
    # finished shards are kept, and no partial file has the name of a shard
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == built.shard_names[:full]
    done = subprocess.run([*command, str(2**30)], capture_output=True, text=True)
    assert done.returncode == 0 and f"({len(built.shard_names) - full} built now)" in done.stdout
    assert digests(tmp_path / "out") == digests(Path(built.folder))


def test_strict_makes_any_quarantine_an_error(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", classes=1, per_class=4)
    (images / "class00" / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"--strict: class00/broken\.jpg is unusable \(not an image\)"):
        pack(str(images), str(tmp_path / "out"), OPTIONS, Local(1), lambda _: None, strict=True)
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert build(images, tmp_path / "out").quarantined == 1  # without --strict the same build succeeds


def test_a_decompression_bomb_and_a_huge_file_are_quarantined(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    Image.new("L", (10, 10)).save(folder / "good.png")
    Image.new("1", (9000, 9000)).save(folder / "bomb.png")
    with (folder / "monster.bmp").open("wb") as file:
        file.truncate(2**27 + 1)
    build(tmp_path / "images", tmp_path / "out")
    lines = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    reasons = {line["source"]: line["reason"] for line in lines}
    assert reasons == {
        "a/bomb.png": "9000 x 9000 pixels, more than 67,108,864: a decompression bomb?",
        "a/monster.bmp": "more than 128 MiB",
    }


def test_an_image_with_damaged_exif_is_packed(tmp_path: Path) -> None:
    """PIL warns about such EXIF data; some ImageNet files have it."""
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x010F], exif[0x011A] = "maker", 72.0
    photograph().save(folder / "x.jpg", exif=exif)
    data = (folder / "x.jpg").read_bytes()
    (folder / "x.jpg").write_bytes(data.replace(b"maker", b"\xff\xff\xff\xff\xff").replace(b"\0\0\0\x48", b"\xff" * 4))
    assert build(tmp_path / "images", tmp_path / "out").quarantined == 0


def test_only_larger_images_are_resized_and_encoded_again(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    sizes = {"wide": (300, 200), "tall": (100, 250), "at": (64, 90), "below": (63, 500)}
    for name, size in sizes.items():
        photograph(*size).save(folder / f"{name}.png")
    photograph(200, 100).convert("L").save(folder / "gray.jpg", quality=95)
    photograph(200, 100).convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    Image.fromarray(np.full((100, 100), 257 * 90, np.uint16)).save(folder / "deep.png")
    options = PackOptions("tiny", "train", 2**20, 3, resize=64, quality=95)
    build(tmp_path / "images", tmp_path / "out", options=options)
    dataset = Dataset.open(tmp_path / "out")
    samples = np.arange(len(dataset))
    packed = zip(dataset.sources(samples), ShardReader(dataset, check_crc=True).read(samples), strict=True)
    packed_files = {Path(source).stem: data.tobytes() for source, data in packed}
    found = {
        Path(source).stem: (int(width), int(height))
        for source, width, height in zip(dataset.sources(samples), dataset.width[:], dataset.height[:], strict=True)
    }
    assert found == {
        "wide": (96, 64),
        "tall": (64, 160),
        "at": (64, 90),
        "below": (63, 500),
        "gray": (128, 64),
        "cmyk": (128, 64),
        "deep": (64, 64),
    }
    assert np.asarray(Image.open(io.BytesIO(packed_files["deep"]))).tolist() == [[90] * 64] * 64
    for name in ("at", "below"):
        assert packed_files[name] == (folder / f"{name}.png").read_bytes()
    assert Image.open(io.BytesIO(packed_files["gray"])).mode == "L"
    exact = photograph(300, 200).resize((96, 64), Image.Resampling.BICUBIC)
    assert packed_files["wide"] == encoded(exact, "JPEG", quality=95).tobytes()
    build(tmp_path / "images", tmp_path / "coarse", options=replace(options, quality=20))
    assert Dataset.open(tmp_path / "coarse").size[:].sum() < dataset.size[:].sum()


def test_worker_memory_does_not_grow_with_huge_images(tmp_path: Path) -> None:
    """Images of 61 megapixels, near the limit of 67."""
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for number in range(3):
        photograph(9331, 6530, seed=number).save(folder / f"{number}.jpg", quality=50)
    script = (
        "import resource, sys; from maelstream.jobs.command import run\n"
        "if __name__ == '__main__':\n"
        "    assert run('pack', [*sys.argv[1:], '--workers', '1']) == 0\n"
        "    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, 'KiB')\n"
    )
    (tmp_path / "build.py").write_text(script)
    command = [sys.executable, str(tmp_path / "build.py"), str(tmp_path / "images"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1].split()[0]) < 300 * 2**10
