"""`maelstream runs` and `maelstream watch`: the state of runs from their files."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from maelstream.jobs.command import run
from maelstream.jobs.recipe import Recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.status import Status
from maelstream.jobs.watch import curve


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run whose status is `running`; no process holds its lock."""
    folder = RunFolder(tmp_path / "runs" / "one")
    folder.start(Recipe(), 0)
    line = {"step": 7, "epoch": 0.5, "loss": 0.25, "lr": 1e-3, "images_per_s": 1234.5, "data_wait": 0.01}
    line |= {"memory_gib": 2.0, "skipped": 1, "spike": False}
    folder.metrics.write_text(json.dumps(line | {"step": 6, "loss": 0.5}) + "\n" + json.dumps(line) + "\n")
    Status("running", 7, 100, 4).write(folder.status)
    return folder


def test_runs_lists_every_run_below_a_folder(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    RunFolder(folder.path.with_name("two")).start(Recipe(), 0)
    assert run("runs", [str(folder.path.parent)]) == 0
    printed = capsys.readouterr().out
    assert "7/100" in printed and "0.2500" in printed and "not begun" in printed


def test_a_folder_without_runs_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("runs", [str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("runs", [str(tmp_path / "typo")]) == 2
    assert f"there is no folder {tmp_path / 'typo'}" in capsys.readouterr().err


def test_no_name_is_cut_at_80_columns(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that differ only in their last letter, and figures of a large run."""
    names = [f"pretrain_vit_b16_imagenet_800_epochs_seed_{seed}" for seed in (0, 1)]
    for name in names:
        shutil.copytree(folder.path, folder.path.with_name(name))
        Status("running", 123_456, 250_000, 128).write(folder.path.with_name(name) / "status.json")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(folder.path.parent.parent)
    assert run("runs", ["runs"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80 and "…" not in printed
    assert printed.count("123,456/250,000") == 2
    width = printed.index("state")
    column = "".join(line[:width].strip() for line in printed.splitlines())
    assert all(f"runs/{name}" in column for name in names)


def test_watch_prints_the_run_once_without_a_terminal(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("watch", [str(folder.path)]) == 0
    printed = capsys.readouterr().out
    assert [line[0] for line in printed.splitlines()[-2:]] == ["━", "█"]  # the bar, and the curve below it
    assert "7 of 100" in printed and "0.2500, lowest 0.2500, first 0.5000" in printed and "1 steps skipped" in printed
    assert run("watch", [str(folder.path.parent)]) == 2


def test_curves_fit_their_width() -> None:
    assert curve([0.0, 1.0, 0.5], 10) == "▁█▅" and len(curve([float(n) for n in range(1000)], 40)) == 40
    assert curve([2.0, 2.0], 10) == "▁▁"


def test_a_link_to_a_run_on_another_disk_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    RunFolder(tmp_path / "disk" / "b16").start(Recipe(), 0)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "disk" / "b16")
    monkeypatch.chdir(tmp_path)
    assert run("runs", ["runs"]) == 0
    assert "runs/linked" in capsys.readouterr().out


def test_folders_that_vanish_or_cannot_be_read_hide_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    RunFolder(tmp_path / "runs" / "one").start(Recipe(), 0)
    (tmp_path / "runs" / "gone").mkdir()
    scandir = os.scandir

    def vanishing(path: Any) -> Any:
        if Path(path).name == "gone":
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert run("runs", [str(tmp_path / "runs")]) == 0
    assert "one" in capsys.readouterr().out
