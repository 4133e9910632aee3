"""Sources and datasets in an object store over HTTP have the same bytes as on a disk."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from maelstream.jobs.command import run
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import DatasetError
from maelstream.shards.reader import ShardReader, coalesced
from maelstream.shards.storage import Storage
from tests.conftest import write_images

OPTIONS = ["--name", "tiny", "--shard-size", "30000", "--seed", "3", "--workers", "2"]


@pytest.fixture(scope="module")
def store() -> Iterator[object]:
    """A client of an empty S3 store on loopback; the environment directs every S3 URI to it."""
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y", "DEFAULT_REGION": "us-east-1"}.items():
            patch.setenv(f"AWS_{name}", value)
        yield boto3.client("s3")
    server.stop()


@pytest.fixture
def bucket(store, request: pytest.FixtureRequest) -> str:  # type: ignore[no-untyped-def]  # boto3 makes its classes
    """A new bucket for one test."""
    name = f"bucket-{abs(hash(request.node.name)) % 10**9}"
    store.create_bucket(Bucket=name)
    return name


def upload(store, bucket: str, folder: Path, prefix: str) -> None:  # type: ignore[no-untyped-def]
    for path in folder.rglob("*"):
        if path.is_file():
            store.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder).as_posix()}")


def objects(store, bucket: str, prefix: str) -> dict[str, bytes]:  # type: ignore[no-untyped-def]
    """Every object below `prefix`."""
    listed = store.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/").get("Contents", [])
    keys = [entry["Key"] for entry in listed if not entry["Key"].endswith("/")]
    return {key[len(prefix) + 1 :]: store.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), classes=3, per_class=10)


@pytest.fixture(scope="module")
def built(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images, packed from disk to disk."""
    folder = tmp_path_factory.mktemp("built") / "tiny"
    assert run("pack", [str(images), str(folder), *OPTIONS]) == 0
    return folder


def test_packing_from_store_to_store_gives_the_same_bytes_as_on_a_disk(  # type: ignore[no-untyped-def]
    store, bucket: str, images: Path, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(store, bucket, images, "src")
    assert run("pack", [f"s3://{bucket}/src", f"s3://{bucket}/deep/out", *OPTIONS]) == 0
    assert objects(store, bucket, "deep/out") == files(built)
    assert run("verify", [f"s3://{bucket}/deep/out", "--deep"]) == 0
    assert run("info", [f"s3://{bucket}/deep/out"]) == 0
    assert "tiny / train" in capsys.readouterr().out


def test_tars_in_a_store_can_be_packed_and_adopted(store, bucket: str, built: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    local = tmp_path / "tars"
    local.mkdir()
    for path in built.glob("*.tar"):
        shutil.copy(path, local)
    upload(store, bucket, local, "tars")
    assert run("pack", [f"s3://{bucket}/tars", str(tmp_path / "packed"), *OPTIONS]) == 0
    assert len(Dataset.open(tmp_path / "packed")) == 30
    two = f"s3://{bucket}/tars/tiny-train-{{000000..000001}}.tar"
    assert run("pack", [two, str(tmp_path / "two"), *OPTIONS]) == 0
    both = [path.name for path in sorted(local.glob("*00000[01].tar"))]
    assert Dataset.open(tmp_path / "two").manifest["samples"] == sum(
        shard["samples"] for shard in Dataset.open(built).manifest["shards"] if shard["name"] in both
    )
    names = ["--name", "tiny", "--workers", "1"]
    assert run("index", [f"s3://{bucket}/tars", *names]) == run("index", [str(local), *names]) == 0
    assert objects(store, bucket, "tars") == files(local)


def test_samples_of_a_store_are_read_by_number(store, bucket: str, built: Path) -> None:  # type: ignore[no-untyped-def]
    upload(store, bucket, built, "data")
    remote, local = Dataset.open(f"s3://{bucket}/data"), Dataset.open(built)
    samples = np.random.default_rng(0).permutation(len(local))
    actual, expected = (ShardReader(dataset, check_crc=True).read(samples) for dataset in (remote, local))
    assert [data.tobytes() for data in actual] == [data.tobytes() for data in expected]
    assert remote.fingerprint == local.fingerprint
    assert remote.keys(samples) == local.keys(samples) and remote.sources(samples) == local.sources(samples)


def test_samples_close_together_are_read_with_one_request() -> None:
    shards = np.array([0, 1, 0, 0, 0])
    offsets = np.array([1000, 0, 0, 2**20, 2**40])
    sizes = np.array([500, 500, 900, 10, 10])
    assert [group.tolist() for group in coalesced(shards, offsets, sizes)] == [[2, 0], [3], [4], [1]]


def test_damage_in_a_store_is_found(store, bucket: str, built: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    upload(store, bucket, built, "data")
    name = Dataset.open(built).shard_names[1]
    data = bytearray((built / name).read_bytes())
    data[2000] ^= 1
    store.put_object(Bucket=bucket, Key=f"data/{name}", Body=bytes(data))
    assert run("verify", [f"s3://{bucket}/data"]) == 1
    assert f"{name}: not the bytes that were packed (SHA-256)" in capsys.readouterr().out
    with pytest.raises(DatasetError, match="is not what was packed"):
        ShardReader(Dataset.open(f"s3://{bucket}/data"), check_crc=True).read(np.arange(30))
    store.delete_object(Bucket=bucket, Key=f"data/{name}")
    with pytest.raises(DatasetError, match=rf"{name} cannot be read"):
        ShardReader(Dataset.open(f"s3://{bucket}/data"), check_crc=False).read(np.arange(30))


def test_a_build_in_a_store_resumes_after_another_part_stopped(  # type: ignore[no-untyped-def]
    store, bucket: str, images: Path, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    destination = f"s3://{bucket}/out"
    assert run("pack", [str(images), destination, *OPTIONS, "--part", "2/2"]) == 0
    assert "are still missing" in capsys.readouterr().out
    assert run("info", [destination]) == 2
    assert "its packing was not finished" in capsys.readouterr().err
    assert run("pack", [str(images), destination, *OPTIONS]) == 0
    assert objects(store, bucket, "out") == files(built)
    assert run("pack", [str(images), destination, *OPTIONS, "--split", "val"]) == 2
    assert "holds something else" in capsys.readouterr().err


def test_a_missing_bucket_and_an_unknown_store_are_errors_of_one_line(  # type: ignore[no-untyped-def]
    store, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for where in ("s3://nowhere-at-all/out", "ftp://host/out"):
        assert run("pack", [str(images), where, *OPTIONS]) == 2
        assert run("pack", [where, str(images) + "-out", *OPTIONS]) == 2
        assert run("info", [where]) == 2
        for line in (printed := capsys.readouterr().err).splitlines():
            assert line.startswith("maelstream ")
        assert printed.count("\n") == 3


def test_credentials_in_a_uri_are_not_shown() -> None:
    assert str(Storage.at("s3://key:secret@bucket/folder/?region=us-east-1")) == "s3://bucket/folder"
