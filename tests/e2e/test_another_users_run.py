"""A run that only another user may write to is read, evaluated and trained from; what is written goes elsewhere."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from maelstream.jobs.evaluation.results import read_evaluations
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.shards.dataset import Dataset
from tests.helpers.forked import run_ranks, start

USER = "as_other_user:"


@pytest.fixture(scope="module")
def others(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A stopped run that nobody may write to."""
    folder = tmp_path_factory.mktemp("others")
    run_ranks(1, tiny, "--run", str(folder / "run"), "--stop-at-step", "4", output=folder / "output")
    set_modes(folder / "run", 0o555, 0o444)
    yield folder / "run"
    set_modes(folder / "run", 0o755, 0o644)


def set_modes(run: Path, folders: int, files: int) -> None:
    for path in sorted([run, *run.rglob("*")]):
        path.chmod(0o755 if path.is_dir() else files)
    for path in sorted([run, *run.rglob("*")], reverse=True):
        if path.is_dir():
            path.chmod(folders)


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("command", "written"),
    [
        ("runs", None),
        ("watch", None),
        ("report", "runs/report-run.html"),
        ("reconstruct", "runs/reconstruct-run/step-00000004-*/grid.png"),
    ],
)
def test_reading_commands_need_no_write_permission(
    others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, written: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(others)
    argument = others.parent if command == "runs" else others
    printed = run_ranks(1, str(argument), output=tmp_path / "output", command=command, fault=f"{USER}").printed
    assert "Traceback" not in printed and "Permission" not in printed and contents(others) == before
    assert written is None or [path for path in tmp_path.glob(written) if path.stat().st_size]


@pytest.mark.parametrize("options", [("--folder", "mine"), ()])
def test_neighbours_of_anothers_run_are_recorded_in_ones_own_folder(
    others: Path, packed: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = (packed.folder, packed.folder)
    printed = run_ranks(
        1, str(others), *data, "--k", "3", *options, output=tmp_path / "output", command="knn", fault=USER
    ).printed
    folder = Path("mine") if options else next(Path("runs").iterdir())
    (found,) = read_evaluations(folder)
    assert found.job == "knn" and f"{others} belongs to another user" in printed


def test_finetuning_of_anothers_run_ends_well(
    others: Path, packed: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--optim.epochs", "0.4", "--optim.warmup-epochs", "0", "--optim.batch-size", "12"]
    arguments = [str(others), packed.folder, packed.folder, "--run", "tuned", *options]
    printed = run_ranks(1, *arguments, output=tmp_path / "output", command="finetune", fault=USER).printed
    assert f"{others} belongs to another user" in printed
    assert [found.job for found in read_evaluations(Path("tuned"))] == ["finetune"]


def test_resuming_anothers_run_is_one_line_before_training(others: Path, tiny: str, tmp_path: Path) -> None:
    started = start(1, tiny, "--run", str(others), output=tmp_path / "output", fault=USER)
    assert started.wait() == [2]
    (line,) = [line for line in started.printed.splitlines() if line.startswith("maelstream ")]
    assert "run.lock cannot be written (Permission denied); give a folder that you may write to" in line
    assert "Traceback" not in started.printed


def test_a_folder_that_cannot_be_written_is_refused_before_the_evaluation(
    others: Path, packed: Dataset, tmp_path: Path
) -> None:
    arguments = [str(others), packed.folder, packed.folder, "--k", "3", "--folder", str(others / "mine")]
    started = start(1, *arguments, output=tmp_path / "output", command="knn", fault=USER)
    assert started.wait() == [2] and f"{others}/mine cannot be written; give a folder" in started.printed


def test_a_run_that_cannot_be_read_hides_no_other_run(others: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name in ("closed", "open"):
        shutil.copytree(others, runs / name)
    set_modes(runs / "closed", 0o555, 0o000)
    printed = run_ranks(1, str(runs), output=tmp_path / "output", command="runs", fault=USER).printed
    for command in ("watch", "report"):
        started = start(1, str(runs / "closed"), output=tmp_path / "output", command=command, fault=USER)
        assert started.wait() == [2] and "cannot be read (Permission denied)" in started.printed
    set_modes(runs, 0o755, 0o644)
    assert "cannot be read" in printed and "4/12" in printed and "Traceback" not in printed
    assert RunFolder(runs / "open").checkpoints.steps() == [4]
