"""The folder of a run: its recipe, its metrics, and the check that a start continues the same experiment."""

import json
from pathlib import Path

import pytest

from maelstream.jobs.recipe import ClassificationRecipe, OptimConfig, Recipe, RecipeError
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.model.config import MAEConfig
from maelstream.shards.errors import MaelstreamError


def test_a_run_resumes_with_another_schedule_if_allowed_and_never_with_another_model(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start(Recipe(), 0)
    longer = Recipe(optim=OptimConfig(epochs=900.0))
    with pytest.raises(
        RecipeError, match=r"another optim.epochs \(800.0, now 900.0\).*--allow optim.epochs, or another"
    ):
        folder.check_same_experiment(longer, ())
    folder.check_same_experiment(longer, ("optim.epochs",))
    with pytest.raises(RecipeError, match="--allow seed: a run keeps it for life"):
        folder.check_same_experiment(longer, ("optim.epochs", "seed"))
    other = Recipe(model=MAEConfig(depth=2), optim=OptimConfig(epochs=900.0))
    with pytest.raises(RecipeError, match=r"model.depth \(12, now 2\)(?!.*--allow)"):
        folder.check_same_experiment(other, ("optim.epochs",))


def test_a_run_of_another_command_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(Recipe(), 0)
    with pytest.raises(RecipeError, match="holds a run of pretrain, not of finetune; give another --run") as caught:
        folder.check_same_experiment(ClassificationRecipe(), ())
    assert len(str(caught.value)) < 200


def test_a_start_removes_the_metrics_after_its_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in (10, 20, 30)))
    folder.start(Recipe(seed=3), 20)
    assert [line["step"] for line in folder.read_metrics()] == [10, 20]
    assert folder.recipe() == Recipe(seed=3)


def test_a_metrics_line_that_a_crash_cut_short_is_skipped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_metrics() == []
    folder.metrics.write_text('{"step": 10}\n{"ste')
    assert folder.read_metrics() == [{"step": 10}]


def test_a_run_on_labels_has_no_recipe_of_pre_training(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "tuned")
    with pytest.raises(MaelstreamError, match=r"is not a run: it has no config\.yaml"):
        folder.any_recipe()
    folder.start(ClassificationRecipe(), 0)
    assert folder.any_recipe() == ClassificationRecipe()
    with pytest.raises(MaelstreamError, match="tuned is a run of finetune; give a run of `maelstream pretrain`"):
        folder.recipe()


def test_the_last_step_is_that_of_the_newest_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(MaelstreamError, match="has no checkpoint yet"):
        folder.last_step()
    for step in (5, 12):
        folder.checkpoints.at(step).mkdir(parents=True)
    assert folder.last_step() == 12
