"""Evidence: its commands use valid recipes, and its page shows means, differences per seed and missing results."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import benchmarks.evidence as evidence_module
from benchmarks.evidence import SEEDS, Evidence, Options, page, run_side_by_side, spread
from maelstream.jobs.evaluation.results import Evaluation, Job, record
from maelstream.jobs.recipe import load_any_recipe, load_recipe
from maelstream.jobs.sweep import Sweep
from maelstream.jobs.sweeps.grid import cells_of, grid_of
from maelstream.jobs.sweeps.sweeping import steps_of


def options(tmp_path: Path, size: str = "reduced") -> Options:
    return Options(Path("cifar10.tar.gz"), size, tmp_path)  # type: ignore[arg-type]


def evaluated(folder: Path, job: Job, top1: float, blocks: float = -1) -> None:
    """Records a result as an evaluation of a run does."""
    weights = folder.parent if job != "scratch" else None
    found = Evaluation(
        job,
        folder.name,
        top1,
        99.0,
        10_000,
        4.0,
        782,
        str(weights or ""),
        "a",
        "b",
        str(folder),
        {"blocks": blocks},
        0.0,
    )
    record(found, weights)


@pytest.mark.parametrize("size", ["reduced", "whole"])
def test_every_command_uses_valid_recipes(size: str, tmp_path: Path) -> None:
    sweeps = 0
    for command in Evidence(options(tmp_path, size)).commands():
        for word in command:
            for name in (part for part in word.split() if part.startswith(f"recipes/evidence/{size}/")):
                load_any_recipe(Path(name))
        if command[0] == "sweep":
            grids = [grid_of(command[place + 1]) for place, word in enumerate(command) if word == "--grid"]
            then = [command[index + 1] for index, word in enumerate(command) if word == "--then"]
            assert cells_of(load_recipe(Path(command[1])), grids, SEEDS) and steps_of(then)
            sweeps += 1
    assert sweeps == 6 and Sweep.__dataclass_fields__.keys() >= {"grid", "seeds", "then", "train", "val"}


def test_every_row_is_a_cell_of_a_sweep_or_a_supervised_run(tmp_path: Path) -> None:
    evidence = Evidence(options(tmp_path))
    folders = {f"scratch-x{times}/seed-{seed}" for times in (1, 2) for seed in SEEDS}
    for command in evidence.commands():
        if command[0] == "sweep":
            grids = [grid_of(command[place + 1]) for place, word in enumerate(command) if word == "--grid"]
            cells = cells_of(load_recipe(Path(command[1])), grids, SEEDS)
            folders |= {f"{Path(command[3]).name}/{cell.folder}" for cell in cells}
    assert {f"{setting.runs}{seed}" for setting in evidence.settings() for seed in SEEDS} == folders


def test_claims_compare_rows_of_the_table(tmp_path: Path) -> None:
    for size in ("reduced", "whole"):
        evidence = Evidence(options(tmp_path, size))
        rows = {setting.name for setting in evidence.settings()}
        assert {row for claim in evidence.claims() for row, _ in (claim.better, claim.worse)} <= rows


def test_the_page_shows_means_differences_and_missing_results(tmp_path: Path) -> None:
    evidence = Evidence(options(tmp_path))
    for seed, (tuned, supervised) in enumerate([(60, 50), (62, 51), (58, 59)]):
        evaluated(evidence.runs / f"base/the-recipe_seed-{seed}" / "finetune", "finetune", tuned)
        evaluated(evidence.runs / f"scratch-x1/seed-{seed}", "scratch", supervised)
    evaluated(evidence.runs / "base/the-recipe_seed-0" / "partial", "partial", 40, 1)
    text = page(evidence, "reduced")
    assert "| random 75 % (the recipe) | 60.00 ± 2.00 | 40.00 (1 of 3) |" in text
    assert "| 1. pre-trained and fine-tuned over supervised | 6.67 ± 6.66 | 2 of 3 |" in text
    assert "| 1. and over supervised for twice the epochs | open |  |" in text
    assert spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"


def test_a_finished_supervised_run_is_not_started_again(tmp_path: Path) -> None:
    evidence = Evidence(options(tmp_path))
    before = sum(command[0] == "launch" for command in evidence.commands())
    evaluated(evidence.runs / "scratch-x1/seed-1", "scratch", 50.0)
    assert sum(command[0] == "launch" for command in evidence.commands()) == before - 1


def test_parts_run_side_by_side_on_their_own_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two run at a time; the third and fourth start after two have ended."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    seen: list[tuple[str, tuple[int, ...], int]] = []
    ended: list[int] = []

    def started(command: list[str], cores: list[int]) -> subprocess.Popen:
        seen.append((command[0], tuple(cores), len(ended)))
        return subprocess.Popen(["true" if command[0] != "c" else "sleep", "0.5"])

    monkeypatch.setattr(evidence_module, "started", started)
    assert run_side_by_side([["a"], ["b"], ["c"], ["d"]], 2, lambda: ended.append(1)) == 0
    assert [(name, after) for name, _, after in seen] == [("a", 0), ("b", 0), ("c", 2), ("d", 2)] and len(ended) == 4
    assert {cores for _, cores, _ in seen} == {(0,), (1,)}


def test_a_failing_part_stops_the_others_and_no_more_start(monkeypatch: pytest.MonkeyPatch) -> None:
    processes: list[subprocess.Popen] = []

    def started(command: list[str], cores: list[int]) -> subprocess.Popen:
        processes.append(subprocess.Popen(command))
        return processes[-1]

    monkeypatch.setattr(evidence_module, "started", started)
    assert run_side_by_side([["sleep", "60"], ["false"], ["sleep", "60"]], 2, lambda: None) == 1
    assert [process.returncode for process in processes] == [-signal.SIGTERM, 1]


def test_a_signal_stops_every_part_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A part that receives SIGTERM twice would end without a checkpoint."""
    counting = (
        "import signal, sys, time; from pathlib import Path; got = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: got.append(1))\n"
        "Path(sys.argv[1]).touch()\n"
        "while not got: time.sleep(0.01)\n"
        "time.sleep(1); Path(sys.argv[1]).write_text(str(len(got)))"
    )
    files = [tmp_path / "a", tmp_path / "b"]

    def started(command: list[str], cores: list[int]) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", counting, *command])
        while not Path(command[0]).exists():
            time.sleep(0.01)
        if command[0] == str(files[-1]):
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return process

    monkeypatch.setattr(evidence_module, "started", started)
    assert run_side_by_side([[str(file)] for file in files], 2, lambda: None) == 128 + signal.SIGTERM
    assert [file.read_text() for file in files] == ["1", "1"]
