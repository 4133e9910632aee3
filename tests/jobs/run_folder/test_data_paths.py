"""A run's data is found from any working directory, and after the run was moved together with its data."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from maelstream.jobs.command import run
from maelstream.jobs.distributed.ranks import Ranks
from maelstream.jobs.recipe import ClassificationRecipe, DataConfig, LabelledData, Recipe
from maelstream.jobs.reporting.exporting import class_names
from maelstream.jobs.reporting.reconstruction import run_dataset
from maelstream.jobs.run_folder.data_paths import located
from maelstream.jobs.run_folder.environment import read_starts, record_start
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError

RECIPE = Recipe(data=DataConfig(dataset="data/images"))


@pytest.fixture
def project(packed: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a dataset, and runs/x that was started in it, outside of which this process works."""
    project = tmp_path / "project"
    shutil.copytree(packed.folder, project / "data" / "images")
    monkeypatch.chdir(project)
    folder = RunFolder(Path("runs/x"))
    folder.start(RECIPE, 0)
    record_start(folder, 0, Ranks(0, 1, 0, 1))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return project


def test_a_relative_path_is_that_of_the_folder_that_the_run_started_in(project: Path) -> None:
    folder = RunFolder(Path("../project/runs/x"))
    assert read_starts(folder)[-1].directory == str(project)
    assert Path(located(folder, "data/images") or "") == project / "data" / "images"
    assert Path(run_dataset(RECIPE, folder)).samefile(project / "data" / "images")
    shutil.move(project / "runs" / "x", "x")  # the run alone
    assert Path(run_dataset(RECIPE, RunFolder(Path("x")))) == project / "data" / "images"


def test_a_run_that_was_moved_with_its_data_finds_it_above_itself(project: Path) -> None:
    project.rename(project.with_name("moved"))
    found = located(RunFolder(Path("../moved/runs/x")), "data/images")
    assert found is not None and Path(found).samefile("../moved/data/images")


def test_a_run_of_an_old_version_finds_its_data_from_anywhere(project: Path) -> None:
    folder = RunFolder(Path("../project/runs/x"))
    starts = json.loads(folder.environment.read_text())
    folder.environment.write_text(json.dumps([{k: v for k, v in s.items() if k != "directory"} for s in starts]))
    assert read_starts(folder)[-1].directory == ""
    assert Path(located(folder, "data/images") or "").samefile(project / "data" / "images")


def test_data_that_is_gone_is_a_line_about_what_to_give(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(project / "data")
    folder = RunFolder(Path("../project/runs/x"))
    assert located(folder, "data/images") is None
    with pytest.raises(MaelstreamError, match=r"was trained on data/images, which is neither .* --dataset"):
        run_dataset(RECIPE, folder)


def test_uris_and_absolute_paths_are_not_searched(project: Path) -> None:
    folder = RunFolder(Path("../project/runs/x"))
    for path in ("s3://bucket/images", "/nowhere/images"):
        assert located(folder, path) == path


def test_an_export_from_elsewhere_has_the_names_of_the_classes(project: Path) -> None:
    recipe = ClassificationRecipe(data=LabelledData(train="data/images", val="data/images"))
    recipe = replace(recipe, model=replace(recipe.model, classes=3))
    assert class_names(recipe, RunFolder(Path("../project/runs/x"))) == ("class00", "class01", "class02")


def test_a_report_from_elsewhere_describes_the_dataset(project: Path) -> None:
    folder = RunFolder(Path("../project/runs/x"))
    line = {"step": 1, "epoch": 0.1, "loss": 0.5, "lr": 0.1, "grad_norm": 1.0, "images_per_s": 9.0, "data_wait": 0.0}
    folder.metrics.write_text(json.dumps(line | {"memory_gib": 1.0, "skipped": 0, "spike": False}) + "\n")
    assert run("report", [str(folder.path)]) == 0
    assert "cannot be opened" not in (folder.path / "report.html").read_text()
