"""The margin of an evaluation is the reference's for the image size, unless a recipe or an option has another."""

from dataclasses import replace
from pathlib import Path

import pytest

from maelstream.jobs.distributed.ranks import Ranks
from maelstream.jobs.evaluation import classifier_evaluator
from maelstream.jobs.evaluation.classifier_evaluator import ClassifierEvaluator
from maelstream.jobs.evaluation.options import EvaluationOptions
from maelstream.jobs.recipe import ClassificationRecipe, LabelledData, Recipe, differing_keys, dump_recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.model.config import ClassifierConfig
from maelstream.pipeline.config import CropConfig
from maelstream.pipeline.eval_pass import Reading
from maelstream.shards.dataset import Dataset

RANKS = Ranks(0, 1, 0, 1)
SIZES = pytest.mark.parametrize(("side", "margin"), [(32, 256 / 224), (224, 256 / 224), (240, 1.0), (448, 1.0)])


def recipe_at(side: int, margin: float | None = None) -> ClassificationRecipe:
    model = ClassifierConfig(3, (side, side), 16, dim=12, depth=1, heads=2)
    return ClassificationRecipe(model=model, data=LabelledData(crop=CropConfig(margin=margin)))


@SIZES
def test_a_runs_own_evaluation_takes_the_margin_of_its_size(
    packed: Dataset, monkeypatch: pytest.MonkeyPatch, side: int, margin: float
) -> None:
    readings: list[Reading] = []
    monkeypatch.setattr(classifier_evaluator, "classify_with", lambda *_: None)
    monkeypatch.setattr(classifier_evaluator, "scores", lambda classify, val, reading, group: readings.append(reading))
    for own in (None, 1.25):
        evaluator = ClassifierEvaluator(recipe_at(side, own), 60, packed, RANKS)
        monkeypatch.setattr(evaluator, "_model", None, raising=False)
        monkeypatch.setattr(evaluator, "_control_group", None, raising=False)
        evaluator._score()
    assert [reading.crop.margin for reading in readings] == [margin, 1.25]


@SIZES
def test_evaluate_takes_the_option_then_the_runs_margin_then_that_of_the_size(
    tmp_path: Path, side: int, margin: float
) -> None:
    (tmp_path / "config.yaml").write_text(dump_recipe(recipe_at(side)))
    stored = RunFolder(tmp_path).any_recipe().data.crop.margin
    size = (side, side)
    assert EvaluationOptions().reading(size, stored, RANKS).crop.margin == margin
    assert EvaluationOptions().reading(size, 1.25, RANKS).crop.margin == 1.25
    assert EvaluationOptions(margin=1.5).reading(size, 1.25, RANKS).crop.margin == 1.5


def test_a_run_of_an_older_version_which_stored_the_margin_is_the_same_experiment() -> None:
    """Unless the stored margin is not the one that the size has today."""
    assert differing_keys(recipe_at(224, 256 / 224), recipe_at(224)) == {}
    assert differing_keys(recipe_at(448, 256 / 224), recipe_at(448)) == {"data.crop.margin": (256 / 224, 1.0)}
    old = replace(Recipe(), data=replace(Recipe().data, crop=CropConfig(margin=256 / 224)))
    assert differing_keys(old, Recipe()) == {}
