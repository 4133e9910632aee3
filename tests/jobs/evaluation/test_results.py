"""Results of evaluations: they are written, read back, and shown with their runs."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from maelstream.jobs.command import run
from maelstream.jobs.evaluation.results import LINES, RESULT, Evaluation, best_of_each, read_evaluations, record
from maelstream.jobs.recipe import Recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.shards.errors import MaelstreamError


def evaluation(folder: Path, **values: object) -> Evaluation:
    known: dict = {"job": "linprobe", "name": "lr 0.1", "top1": 68.0, "top5": 88.5, "images": 200, "epochs": 90.0}
    known |= {"step": 12, "weights": "run", "train": "t", "val": "v", "settings": {"lr": 0.1}, "finished": 1.5}
    return Evaluation(**known | values, folder=str(folder))


def test_a_recorded_evaluation_is_read_back_from_the_run_and_from_its_own_folder(tmp_path: Path) -> None:
    (run_folder := tmp_path / "run").mkdir()
    first = evaluation(tmp_path / "probe")
    second = evaluation(tmp_path / "tuned", job="finetune", top1=83.6, step=None, epochs=None)
    for each in (first, second):
        record(each, run_folder)
    assert read_evaluations(run_folder) == [first, second]
    assert read_evaluations(tmp_path / "tuned") == [second]
    assert json.loads((tmp_path / "tuned" / RESULT).read_text()) == asdict(second)


def test_without_a_run_only_the_result_is_written(tmp_path: Path) -> None:
    record(evaluation(tmp_path / "probe"), None)
    assert [path.name for path in (tmp_path / "probe").iterdir()] == [RESULT]
    assert read_evaluations(tmp_path) == []


def test_an_incomplete_last_line_is_ignored_and_later_lines_are_intact(tmp_path: Path) -> None:
    first, second = evaluation(tmp_path / "a"), evaluation(tmp_path / "b")
    record(first, tmp_path)
    with (tmp_path / LINES).open("a") as file:
        file.write('{"job": "finetune", "na')
    assert read_evaluations(tmp_path) == [first]
    record(second, tmp_path)
    assert read_evaluations(tmp_path) == [first, second]


def test_a_repeated_evaluation_in_the_same_folder_counts_once(tmp_path: Path) -> None:
    first = evaluation(tmp_path / "a")
    again = replace(first, top1=70.0, finished=2.5)
    for each in (first, evaluation(tmp_path / "b"), again):
        record(each, tmp_path)
    assert [found.top1 for found in read_evaluations(tmp_path)] == [70.0, 68.0]


@pytest.mark.parametrize("text", ["{}", "[1]", "nonsense"])
def test_the_error_for_a_damaged_line_names_it(tmp_path: Path, text: str) -> None:
    record(evaluation(tmp_path / "a"), tmp_path)
    with (tmp_path / LINES).open("a") as file:
        file.write(f"{text}\n")
    with pytest.raises(MaelstreamError, match=r"evaluations\.jsonl, line 2 is damaged, or of another version"):
        read_evaluations(tmp_path)


def test_a_folder_that_cannot_be_created_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MaelstreamError, match=r"file.* cannot be written \(Not a directory\)"):
        record(evaluation(tmp_path / "file" / "probe"), None)


def test_the_runs_command_shows_the_best_top1_per_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [
        evaluation(tmp_path / "a", job="finetune", top1=83.6),
        evaluation(tmp_path / "b"),
        evaluation(tmp_path / "c", top1=67.0),
    ]
    assert best_of_each(results) == "linprobe 68.0, finetune 83.6" and best_of_each([]) == ""
    folder = RunFolder(tmp_path / "runs" / "one")
    folder.start(Recipe(), 0)
    for each in results:
        record(each, folder.path)
    monkeypatch.setenv("COLUMNS", "300")
    assert run("runs", [str(tmp_path / "runs")]) == 0
    assert "linprobe 68.0, finetune 83.6" in capsys.readouterr().out
