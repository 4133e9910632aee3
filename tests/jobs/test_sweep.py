"""Sweeps with a fake launcher that only writes the files of a run: which commands run, and what the tables show."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maelstream.jobs import sweep
from maelstream.jobs.command import run
from maelstream.jobs.evaluation.results import Evaluation, record
from maelstream.jobs.recipe import load_recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.status import Status
from maelstream.shards.dataset import Dataset

RATIOS = ["--grid", "model.mask_ratio=0.5,0.75", "--seeds", "0,1"]
TOP1 = {("0.5", "0"): 60.0, ("0.5", "1"): 62.0, ("0.75", "0"): 70.0, ("0.75", "1"): 71.0}


class Launcher:
    """Replaces `maelstream launch`; the `fails`-th command (from 1) returns the exit code of Ctrl-C."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.fails = 0

    def __call__(self, arguments: list[str]) -> int:
        self.commands.append(arguments)
        if len(self.commands) == self.fails:
            return 130
        if arguments[0] == "pretrain":
            folder = RunFolder(Path(arguments[3]))
            folder.start(load_recipe(Path(arguments[1])), 12)
            folder.metrics.write_text(json.dumps({"step": 12, "loss": 0.5}) + "\n")
            (folder.checkpoints.folder / "step-00000012").mkdir(parents=True)
            Status("finished", 12, 12, 1).write(folder.status)
            return 0
        job, weights, train, val, *options = arguments
        where = options[options.index("--folder" if job == "knn" else "--run") + 1]
        ratio, seed = Path(weights).name.removeprefix("mask-ratio-").split("_seed-")
        top1 = TOP1[ratio, seed] + (10 if job == "finetune" else 0)
        record(Evaluation(job, job, top1, 90.0, 100, 1.0, 12, weights, train, val, where, {}, 0.0), Path(weights))  # type: ignore[arg-type]
        return 0


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    fake = Launcher()
    monkeypatch.setattr(sweep, "launched", lambda nproc, max_restarts: fake)
    return fake


@pytest.fixture(autouse=True)
def datasets(packed: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The datasets `train` and `val` in the working directory: 60 images of 3 classes."""
    monkeypatch.chdir(tmp_path)
    for name in ("train", "val"):
        (tmp_path / name).symlink_to(packed.folder)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text("data: {dataset: train}\nmodel: {depth: 2}\n")
    return str(path)


def test_every_cell_is_a_run_with_its_evaluations_and_the_table_has_means_and_spreads(
    tmp_path: Path, launcher: Launcher, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    then = ["--then", "linprobe --optim.epochs 12", "--then", "finetune", "--then", "knn", "--val", "val"]
    assert run("sweep", [recipe, "--dir", str(tmp_path / "out"), *RATIOS, *then]) == 0
    assert [command[0] for command in launcher.commands] == ["pretrain", "linprobe", "finetune", "knn"] * 4
    cell = tmp_path / "out" / "mask-ratio-0.5_seed-1"
    assert RunFolder(cell).recipe().model.mask_ratio == 0.5 and RunFolder(cell).recipe().seed == 1
    own = ["--run", str(cell / "linprobe-optim.epochs-12"), "--seed", "1"]
    assert ["linprobe", str(cell), "train", "val", "--optim.epochs", "12", *own] in launcher.commands
    printed = capsys.readouterr().out
    assert "61.0 ± 1.4" in printed and "70.5 ± 0.7" in printed and "71.0 ± 1.4" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["rows"][1]["finetune"] == {"mean": 80.5, "deviation": pytest.approx(0.7071, 1e-3), "seeds": 2}
    with (tmp_path / "out" / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["model.mask_ratio"] for line in lines] == ["0.5", "0.5", "0.75", "0.75"]
    assert [float(line["knn"]) for line in lines] == list(TOP1.values())
    assert Image.open(tmp_path / "out" / "sweep.png").size[0] > 1000


@pytest.mark.parametrize("fails", [1, 2, 4, 8])
def test_a_stopped_sweep_resumes_and_repeats_nothing(
    tmp_path: Path, launcher: Launcher, recipe: str, fails: int, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [recipe, "--dir", str(tmp_path / "out"), *RATIOS, "--then", "linprobe", "--val", "val"]
    launcher.fails = fails
    assert run("sweep", options) == 130
    assert "the same command resumes from here" in capsys.readouterr().out
    before, launcher.commands, launcher.fails = launcher.commands, [], 0
    assert run("sweep", options) == 0
    assert launcher.commands[0] == before[-1] and len(before) + len(launcher.commands) == 8 + 1
    launcher.commands = []
    assert run("sweep", options) == 0 and launcher.commands == []
    longer = [*options, "--then", "finetune"]
    assert run("sweep", longer) == 0
    assert {command[0] for command in launcher.commands} == {"finetune"}


def test_the_table_of_a_grid_of_table_1_shows_the_papers_numbers(
    tmp_path: Path,
    launcher: Launcher,
    recipe: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"{__name__}.TOP1", {(f"{depth}", "0"): 50.0 + depth for depth in (1, 2, 4, 8, 12)})
    options = ["--grid", "decoder_depth", "--then", "finetune", "--then", "linprobe", "--val", "val"]
    assert run("sweep", [recipe, "--dir", str(tmp_path / "out"), *options]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("│ 12 "))
    assert line.replace("│", " ").split() == ["12", "1/1", "0.5000", "72.0", "62.0", "84.4", "73.3"]


def test_partial_fine_tuning_is_one_run_and_a_curve_over_blocks(
    tmp_path: Path, launcher: Launcher, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.TOP1", {("MAE", "0"): 50.0})
    Path(recipe).write_text("data: {dataset: train}\nmodel: {depth: 24}\n")
    assert run("sweep", [recipe, "--dir", str(tmp_path / "out"), "--grid", "partial_blocks", "--val", "val"]) == 0
    assert [command[0] for command in launcher.commands] == ["pretrain"] + ["partial"] * 9
    assert (tmp_path / "out" / "sweep.png").exists()


def test_a_changed_recipe_or_other_data_is_an_error_before_anything_starts(
    tmp_path: Path, launcher: Launcher, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [recipe, "--dir", str(tmp_path / "out"), *RATIOS, "--then", "linprobe", "--val"]
    assert run("sweep", [*options, "val"]) == 0
    launcher.commands = []
    assert run("sweep", [*options, "other"]) == 2
    assert "scored on val; give these as --train and --val" in capsys.readouterr().err
    Path(recipe).write_text("data: {dataset: train}\nmodel: {depth: 3}\n")
    assert run("sweep", [*options, "val"]) == 2
    assert "another model.depth (2, now 3)" in capsys.readouterr().err.replace("\n", " ") and not launcher.commands


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "a sweep needs --grid"),
        (["--grid", "model.depth=2", "--then", "linprobe"], "needs --val"),
        (["--grid", "model.depth=2", "--then", "reconstruct"], "finetune, linprobe, partial, knn"),
        (["--grid", "model.depth=2", "--then", "knn", "--then", "knn", "--val", "v"], "comes twice"),
        (["--seeds", "0,a"], "'a' is no seed"),
        (["--seeds", "1,1"], "the same cell twice"),
        (["--grid", "model.depth=2", "--nproc", "0"], "--nproc starts at 1"),
        (["--grid", "model.dept=2"], "the nearest is model.depth"),
    ],
)
def test_bad_options_are_an_error_of_one_line(
    tmp_path: Path, launcher: Launcher, recipe: str, capsys: Any, options: list[str], complaint: str
) -> None:
    assert run("sweep", [recipe, "--dir", str(tmp_path / "out"), *options]) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1 and not launcher.commands


@pytest.mark.parametrize(
    ("then", "complaint"),
    [
        ("linprobe --optim.epoch 3", '--then "linprobe --optim.epoch 3": .*the nearest is --optim.epochs'),
        ("linprobe --optim.epochs many", "Error parsing --optim.epochs"),
        ("finetune --optim.warmup-epochs 900", "warmup_epochs 900.0 is not in 0..epochs"),
        ("finetune --recipe nowhere.yaml", "recipe nowhere.yaml cannot be read"),
        ("finetune --recipe linprobe_vit_b16", "is a recipe of linprobe"),
        ("finetune --recipe pretrain_vit_b16", "is a recipe of pretrain"),
        ("finetune 'a", "cannot be read: No closing quotation"),
        ("partial", "partial needs --blocks"),
        ("partial --blocks 3", "the encoder has 2 blocks"),
        ("partial --blocks x", "Error parsing --blocks"),
        ("knn --kk 3", '--then "knn --kk 3": Unrecognized options: --kk, 3'),
        ("knn --k 61", "--k 61: val has 60 images|--k 61: train has 60 images"),
        ("knn --k 0", "--k 0 must be at least 1"),
    ],
)
def test_an_evaluation_that_cannot_start_is_found_before_the_first_cell_is_trained(
    tmp_path: Path, launcher: Launcher, recipe: str, capsys: pytest.CaptureFixture[str], then: str, complaint: str
) -> None:
    options = [*RATIOS, "--then", "linprobe", "--then", then, "--val", "val"]
    assert run("sweep", [recipe, "--dir", str(tmp_path / "out"), *options]) == 2
    printed = capsys.readouterr().err
    assert re.search(complaint, printed) and printed.count("\n") == 1
    assert not launcher.commands and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--val", "nowhere"], "nowhere is not a packed dataset"),
        (["--val", "val", "--train", "nowhere"], "nowhere is not a packed dataset"),
        (["--val", "val", "--dir", "tiny.yaml/out"], "--dir tiny.yaml/out cannot be written"),
    ],
)
def test_data_and_the_folder_are_checked_before_the_first_cell_is_trained(
    launcher: Launcher, recipe: str, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    assert run("sweep", [recipe, "--dir", "out", *RATIOS, "--then", "finetune", *options]) == 2
    assert complaint in capsys.readouterr().err and not launcher.commands


def test_a_slash_at_the_end_of_a_datasets_path_changes_nothing(launcher: Launcher, recipe: str) -> None:
    options = [recipe, "--dir", "out", *RATIOS, "--then", "knn", "--val"]
    assert run("sweep", [*options, "val"]) == 0 and len(launcher.commands) == 8
    assert run("sweep", [*options, "val/"]) == 0 and len(launcher.commands) == 8
