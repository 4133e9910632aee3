"""Stores that never answer, or answer slowly or with errors, end a command with one line, in a bounded time."""

import pickle
import threading
import time

import pytest

from maelstream.jobs.command import run
from maelstream.shards import retry
from maelstream.shards.errors import DatasetError, StorageError
from maelstream.shards.retry import read_with_retries, within
from maelstream.shards.storage import RemoteFile, Storage
from tests.helpers.bad_servers import bad_server


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("MAELSTREAM_CONNECT_TIMEOUT_S", "1")
    monkeypatch.setenv("MAELSTREAM_READ_TIMEOUT_S", "1")
    monkeypatch.setattr("maelstream.shards.retry.PAUSES_S", (0.01,))
    monkeypatch.setattr("maelstream.shards.retry._MESSAGE_S", 0.0)


@pytest.mark.parametrize(("kind", "reason"), [("silent", "too slow"), ("busy", "503"), ("none", "resolve host")])
def test_a_store_that_does_not_answer_is_named(kind: str, reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    with bad_server(kind) as address:
        address = "no-such-host.invalid:80" if kind == "none" else address
        assert run("info", [f"s3://bucket/x?scheme=http&endpoint_override={address}"]) == 2
    assert time.monotonic() - start < 6
    waits, error = capfd.readouterr().err.splitlines()
    assert reason in waits and "next attempt in 0.01 s (2 of 2)" in waits
    assert error.startswith("maelstream info: s3://bucket/x cannot be reached (") and "tried 2 times" in error


def test_workers_of_a_build_have_the_same_limits() -> None:
    """Pickling a pyarrow file system loses its retry strategy."""
    with bad_server("busy") as address:
        storage = pickle.loads(pickle.dumps(Storage.at(f"s3://b/x?scheme=http&endpoint_override={address}")))
        start = time.monotonic()
        with pytest.raises(StorageError, match="tried 2 times"):
            storage.kind()
        assert time.monotonic() - start < 1


def test_a_call_that_never_returns_is_given_up() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no complete answer within 0 s"):
        within(0.1, lambda: threading.Event().wait(5))
    assert time.monotonic() - start < 1 and within(1, lambda: 7) == 7


def test_no_attempt_starts_after_five_read_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maelstream.shards.retry.PAUSES_S", (0.01,) * 99)
    monkeypatch.setenv("MAELSTREAM_READ_TIMEOUT_S", "0.02")
    calls: list[float] = []

    def read() -> None:
        calls.append(time.monotonic())
        time.sleep(0.04)
        raise StorageError("no answer")

    with pytest.raises(StorageError, match=r"no answer; tried [23] times"):
        read_with_retries(read)
    assert len(calls) in (2, 3)


def test_the_default_limits_end_within_five_minutes() -> None:
    assert sum(retry.PAUSES_S) < 60
    assert (retry._LAST_START_READS + 1) * 30 + 10 + 2**24 / 2**18 < 300


@pytest.mark.parametrize("value", ["soon", "0", "-1", "inf", "nan"])
def test_a_limit_that_is_no_number_of_seconds_is_one_line(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MAELSTREAM_READ_TIMEOUT_S", value)
    with pytest.raises(DatasetError, match=r"MAELSTREAM_READ_TIMEOUT_S=.*give a number of seconds above 0"):
        Storage.at("s3://bucket/x").kind()


def test_a_remote_file_is_read_as_a_local_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maelstream.shards.storage._REQUEST_BYTES", 4)
    data, requests = bytes(range(10)), []

    def read_at(size: int, offset: int) -> bytes:
        requests.append((size, offset))
        return data[offset : offset + size]

    file = RemoteFile(len(data), read_at)
    assert file.read(3) == data[:3] and file.read() == data[3:] and file.read(5) == b""
    assert file.seek(-2, 2) == 8 and file.read(100) == data[8:] and file.read_at(100, 9) == data[9:]
    assert max(size for size, _ in requests) == 4
