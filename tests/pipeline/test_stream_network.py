"""Streams from servers and commands that stand still, drip or send too much end with one line, in a bounded time."""

import io
import resource
import tarfile
import time

import pytest

from maelstream.pipeline.stream import Stream
from maelstream.pipeline.stream_source import _read_shard
from maelstream.shards.errors import MaelstreamError, StorageError
from tests.helpers.bad_servers import bad_server


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAELSTREAM_READ_TIMEOUT_S", "0.4")
    monkeypatch.setattr("maelstream.shards.retry.PAUSES_S", (0.01,))
    monkeypatch.setattr("maelstream.shards.retry._MESSAGE_S", 0.0)


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def tar_of_two(first_bytes: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, size in (("0.txt", first_bytes), ("1.txt", 100)):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("silent", "it sent nothing for 0.4 s"),
        ("half", "it sent nothing for 0.4 s"),
        ("drip", r"it sent only \d+ bytes in 0 s"),
        ("busy", "returned error: 503"),
    ],
)
def test_a_server_that_does_not_deliver_is_named(kind: str, reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    with (
        bad_server(kind, tar_of_two(50_000)) as address,
        pytest.raises(StorageError, match=rf"http://{address}/a.tar cannot be read \(.*{reason}.*\); tried 2 times"),
    ):
        list(_read_shard(f"http://{address}/a.tar"))
    assert time.monotonic() - start < 3
    waits = capfd.readouterr().err
    assert waits.count("\n") == 1 and "next attempt in 0.01 s (2 of 2)" in waits


def test_a_command_that_stands_still_and_a_host_without_an_address_are_named() -> None:
    with pytest.raises(StorageError, match=r"it sent nothing for 0.4 s\); tried 2 times"):
        list(_read_shard("pipe:sleep 20"))
    with pytest.raises(StorageError, match=r"exit code 3\); tried 2 times"):
        list(_read_shard("pipe:exit 3"))
    with pytest.raises(StorageError, match=r"Could not resolve host.*\); tried 2 times"):
        list(_read_shard("http://no-such-host.invalid/a.tar"))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (tar_header("0.jpg", 2**33 - 1), "has 8,589,934,591 bytes"),
        (tar_header("name", 2**30, tarfile.GNUTYPE_LONGNAME), "has 1,073,741,824 bytes; 0 to 1,048,576 are possible"),
        (tar_of_two(10), "more than 64 MiB of zeros"),
    ],
)
def test_an_endless_body_is_refused_before_it_fills_the_memory(body: bytes, reason: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with bad_server("endless", body) as address, pytest.raises(StorageError, match=reason):
        list(_read_shard(f"http://{address}/a.tar"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB: 64 MiB


def test_the_members_of_a_sample_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maelstream.pipeline.stream_source._SAMPLE_BYTES", 2**20)
    members = b"".join(tar_header(f"0.{number}", 2**19) + bytes(2**19) for number in range(3))
    with bad_server("endless", members) as address, pytest.raises(StorageError, match="sample 0 have more than 1 MiB"):
        list(_read_shard(f"http://{address}/a.tar"))


def test_a_reader_that_is_slow_itself_does_not_count_as_a_slow_server() -> None:
    for _ in _read_shard("pipe:head -c 1000000 /dev/zero | tar c --transform 's,.*,0.txt,' /proc/self/cmdline"):
        time.sleep(0.6)


@pytest.mark.parametrize("urls", ["http://host/{0000..0003.tar", "http://host/0}.tar", "{0..99999999}.tar"])
def test_braces_that_cannot_be_expanded_are_one_line(urls: str) -> None:
    with pytest.raises(MaelstreamError, match=r"braces cannot be expanded|more than 1,000,000"):
        Stream(urls, 10)
