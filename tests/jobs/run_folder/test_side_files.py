"""Damaged by-products of a run: commands that read it still answer, and a start repairs them or puts them aside."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from maelstream.jobs.command import run
from maelstream.jobs.run_folder.environment import read_starts
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.side_files import faults, repair
from maelstream.jobs.run_folder.status import is_locked, read_status, state_of
from maelstream.shards.dataset import Dataset
from tests.helpers.reported import make_run


@pytest.fixture(scope="module")
def whole(packed: Dataset, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stopped run of 40 steps with all side files."""
    folder = make_run(tmp_path_factory.mktemp("whole") / "run", tiny)
    folder.lock.write_text("host here, process 1, since today")
    return folder.path


@pytest.fixture
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A copy that tests may damage."""
    monkeypatch.setenv("COLUMNS", "250")
    return RunFolder(shutil.copytree(whole, tmp_path / "runs" / "one"))


def as_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    (path / "x").mkdir(parents=True)


def as_file(path: Path) -> None:
    path.write_text("a file")


def as_dead_link(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/nowhere")


def content(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    *((name, as_folder, "is not a file") for name in ("metrics.jsonl", "status.json", "environment.json")),
    *((name, as_folder, "is not a file") for name in ("quarantine.jsonl", "checkpoints/newest")),
    *((name, as_file, "is not a folder") for name in ("tensorboard", "ranks")),
    *((name, as_dead_link, "is not a f") for name in ("tensorboard", "status.json", "checkpoints/newest")),
    *((name, content(b""), "is damaged") for name in ("status.json", "environment.json")),
    *((name, content(b"\0" * 100), "is damaged") for name in ("status.json", "environment.json")),
    *((name, content(b"[" * 100_000 + b"\n"), "damaged") for name in ("status.json", "metrics.jsonl")),
    ("status.json", content(b'{"state": "running", "step": 1e30, "total_steps": 5, "ranks": 1}'), "is damaged"),
    (
        "status.json",
        content(b'{"state": "running", "step": 3, "total_steps": 5, "ranks": 1, "updated": NaN}'),
        "is dam",
    ),
    ("environment.json", content(b'[{"step": 1}]'), "is damaged"),
    ("metrics.jsonl", content(b"\0" * 4096 + b'\n{"step": 0}\n7\n\xff\xfe\n'), "4 of 4 lines are damaged"),
    ("metrics.jsonl", content(b'{"step": 3, "loss": "low"}\n{"step": -3}\n{"step": 1e9}\n'), "3 of 3 lines"),
    ("quarantine.jsonl", content(b'{"shard": 7}\n'), "1 of 1 lines are damaged"),
]


@pytest.mark.parametrize(("name", "damage", "fault"), DAMAGE)
def test_a_damaged_side_file_is_named_once_and_put_aside_by_the_next_start(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[Path], object], fault: str
) -> None:
    path = folder.path / name
    damage(path)
    (found,) = faults(folder)
    assert found.startswith(str(path)) and fault in found
    assert run("runs", [str(folder.path.parent)]) == 0
    printed = capsys.readouterr()
    assert found in printed.err and "one" in printed.out
    assert run("watch", [str(folder.path)]) == 0
    assert run("report", [str(folder.path)]) == (2 if name == "metrics.jsonl" else 0)  # it has no step to report
    (message,) = repair(folder)
    assert message.startswith(found) and f"{path.name}.bad" in message
    assert path.with_name(f"{path.name}.bad").is_symlink() or path.with_name(f"{path.name}.bad").exists()
    assert faults(folder) == []


def test_heartbeats_of_the_start_before_are_deleted_and_an_odd_one_is_put_aside(folder: RunFolder) -> None:
    folder.ranks.mkdir()
    (folder.ranks / "00000").write_text("\0\0")
    assert repair(folder) == [] and not list(folder.ranks.iterdir())
    (folder.ranks / "00001").mkdir()
    assert repair(folder) == [f"{folder.ranks}: 00001 is not a file; it is now ranks.bad"]
    assert not folder.ranks.exists()


def test_a_whole_run_has_no_faults_and_nothing_is_repaired(folder: RunFolder) -> None:
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    assert faults(folder) == [] and repair(folder) == []
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def test_the_good_lines_of_a_damaged_log_are_kept(folder: RunFolder) -> None:
    lines = folder.metrics.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:5], b"\0" * 512 + lines[5], b"\xff garbage\n", *lines[6:], b'{"step": 41, "lo'])
    folder.metrics.write_bytes(damaged)
    assert [line["step"] for line in folder.read_metrics()] == list(range(1, 41))
    (message,) = repair(folder)
    assert (
        message == f"{folder.metrics}: 1 of 41 lines are damaged; it is now metrics.jsonl.bad, its good lines are kept"
    )
    assert folder.metrics.read_bytes() == b"".join(lines)
    assert folder.metrics.with_name("metrics.jsonl.bad").read_bytes() == damaged


def test_a_logged_infinity_is_an_unknown_value_and_no_damage(folder: RunFolder) -> None:
    folder.metrics.write_text('{"step": 1, "loss": 0.5, "grad_norm": Infinity}\n')
    assert folder.read_metrics() == [{"step": 1, "loss": 0.5, "grad_norm": None}] and faults(folder) == []


def test_the_state_of_a_run_with_a_damaged_status_is_unknown(folder: RunFolder) -> None:
    folder.status.write_bytes(b"")
    folder.environment.write_bytes(b"")
    assert read_status(folder.status) is None and state_of(folder) == "unknown" and read_starts(folder) == []


def test_a_lock_that_is_a_folder_locks_nothing(folder: RunFolder) -> None:
    as_folder(folder.lock)
    assert not is_locked(folder.lock)


def test_a_reason_with_square_brackets_is_printed_as_it_is(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    status = json.loads(folder.status.read_text())
    folder.status.write_text(json.dumps(status | {"state": "failed", "why": "[/b] :x:"}))
    for command in (["runs", str(folder.path.parent)], ["watch", str(folder.path)]):
        assert run(command[0], command[1:]) == 0
        assert "[/b] :x:" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("seed", range(4))
def test_no_edit_of_a_byte_makes_a_reading_command_fail_with_a_traceback(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    """A few of many: thousands of edits were tried with the same function."""
    draw = random.Random(seed)
    files = sorted(path for path in folder.path.rglob("*.json*") if path.is_file())
    for path in files:
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] = draw.choice(b'0-9.e[]{}",:\n\0\xff')
        path.write_bytes(data)
    for command in (["runs", str(folder.path.parent)], ["watch", str(folder.path)], ["report", str(folder.path)]):
        assert run(command[0], command[1:]) in (0, 2)
