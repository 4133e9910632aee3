"""Datasets and runs that an older version wrote still open, verify, resume and evaluate."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from maelstream.jobs.command import run
from maelstream.jobs.evaluation.results import read_evaluations
from maelstream.jobs.recipe import dump_recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.shards.dataset import Dataset
from maelstream.shards.reader import ShardReader
from tests.helpers.forked import run_ranks

OLD = Path(__file__).parents[1] / "version_0_1"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the old files, which the commands may write to."""
    return shutil.copytree(OLD, tmp_path / "old")


def test_an_old_dataset_opens_and_verifies(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = Dataset.open(old / "dataset")
    assert (len(dataset), dataset.classes) == (12, ["class0", "class1"])
    assert all(data[:2].tobytes() == b"\xff\xd8" for data in ShardReader(dataset, check_crc=True).read(np.arange(12)))
    assert run("verify", [str(old / "dataset"), "--deep"]) == 0
    assert run("info", [str(old / "dataset")]) == 0


def test_an_old_run_is_listed_exported_and_reported(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(old)  # the run names its dataset by a relative path
    assert run("runs", ["."]) == 0 and "3/6" in capsys.readouterr().out
    for command in (["watch", "run"], ["export", "run", "--format", "timm"], ["report", "run"]):
        assert run(command[0], command[1:]) == 0


def test_an_old_run_resumes_with_the_losses_that_it_would_have_had(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Today, sets of up to 16 samples have another order (docs/pipeline.md), so the old one is restored for its 12."""
    monkeypatch.chdir(old)
    folder = RunFolder(Path("run"))
    Path("recipe.yaml").write_text(dump_recipe(folder.recipe()))
    dataset = str(old / "dataset")
    options = ["--run", str(old / "run"), "--data.dataset", dataset, "--allow", "data.dataset"]
    recipe, fault = str(old / "recipe.yaml"), "feistel_for_small_sets:"
    run_ranks(1, recipe, *options, output=tmp_path / "output", fault=fault)
    expected = [json.loads(line) for line in (old / "expected_metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in folder.read_metrics()] == [line["step"] for line in expected]
    losses = [line["loss"] for line in folder.read_metrics()]
    assert losses == pytest.approx([line["loss"] for line in expected], rel=1e-5)  # CPUs sum in different orders


def test_an_old_classifier_is_evaluated(old: Path, tmp_path: Path) -> None:
    result = tmp_path / "result"
    arguments = [str(old / "tuned"), str(old / "dataset"), "--folder", str(result)]
    run_ranks(1, *arguments, output=tmp_path / "output", command="evaluate")
    (evaluation,) = read_evaluations(result)
    assert evaluation.images == 12 and len(evaluation.settings["all"]) == 2  # the weights and their EMA
