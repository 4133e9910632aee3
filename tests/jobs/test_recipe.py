"""Recipes: laid over their base, checked key by key, and the same again after a round trip."""

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maelstream.jobs.evaluation.classification import model_of
from maelstream.jobs.recipe import (
    ClassificationRecipe,
    Recipe,
    RecipeError,
    differing_keys,
    dump_recipe,
    load_any_recipe,
    load_recipe,
    read_values,
)
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.training.trainer import schedule_of
from maelstream.model.mae import MAE

EVERY = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
LABELLED = [path for path in EVERY if "job" in read_values(path)]
RECIPES = [path for path in EVERY if path not in LABELLED]


def recipe_file(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_builds(path: Path) -> None:
    recipe = load_recipe(path)
    with torch.device("meta"):  # shapes without memory: ViT-H is 2.6 GB
        model = MAE(recipe.model)
    assert sum(parameter.numel() for parameter in model.parameters()) > 10_000
    assert schedule_of(recipe, 1_281_167).total_steps > 0


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_a_printed_recipe_is_the_same_recipe(path: Path, tmp_path: Path) -> None:
    recipe = load_any_recipe(path)
    assert load_any_recipe(recipe_file(tmp_path, dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("path", LABELLED, ids=lambda path: path.stem)
def test_every_recipe_on_labels_parses_and_builds(path: Path) -> None:
    recipe = load_any_recipe(path)
    assert isinstance(recipe, ClassificationRecipe)
    with torch.device("meta"):
        model = model_of(replace(recipe, weights=""), None)
    learnt = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    probed = recipe.model.dim * recipe.model.classes + recipe.model.classes
    assert learnt == probed if recipe.tuning.probe else learnt > 50_000_000


# recipes.md: base lr, epochs, warm-up, batch, weight decay, layer decay, drop path
LABELLED_TABLE = {
    "finetune_vit_b16": (5e-4, 100, 5, 1024, 0.05, 0.65, 0.1),
    "finetune_vit_l16": (1e-3, 50, 5, 1024, 0.05, 0.75, 0.2),
    "finetune_vit_h14": (1e-3, 50, 5, 1024, 0.05, 0.75, 0.3),
    "finetune_vit_h14_448": (1e-3, 50, 5, 1024, 0.05, 0.75, 0.3),
    "linprobe_vit_b16": (0.1, 90, 10, 16384, 0, 1, 0),
    "linprobe_vit_l16": (0.1, 50, 10, 16384, 0, 1, 0),
    "linprobe_vit_h14": (0.1, 50, 10, 16384, 0, 1, 0),
    "scratch_vit_b16": (1e-4, 300, 20, 4096, 0.3, 1, 0.1),
    "scratch_vit_l16": (1e-4, 200, 20, 4096, 0.3, 1, 0.2),
    "scratch_vit_h14": (1e-4, 200, 20, 4096, 0.3, 1, 0.2),
}


@pytest.mark.parametrize("name", LABELLED_TABLE)
def test_recipes_on_labels_have_the_papers_numbers(name: str) -> None:
    recipe = load_any_recipe(EVERY[0].with_name(f"{name}.yaml"))
    assert isinstance(recipe, ClassificationRecipe)
    optim, tuning = recipe.optim, recipe.tuning
    numbers = (optim.base_lr, optim.epochs, optim.warmup_epochs, optim.batch_size, optim.weight_decay)
    assert (*numbers, tuning.layer_decay, recipe.model.drop_path) == LABELLED_TABLE[name]
    mixed = (0, 0, 0) if recipe.job == "linprobe" else (0.8, 1.0, 0.1)
    assert (recipe.mixup.mixup, recipe.mixup.cutmix, recipe.mixup.label_smoothing) == mixed
    assert tuning.optimizer == ("lars" if recipe.job == "linprobe" else "adamw")
    assert tuning.ema == (0.9999 if recipe.job == "scratch" else 0)


def test_the_papers_fine_tuning_is_the_default() -> None:
    recipe = load_any_recipe(EVERY[0].with_name("finetune_vit_b16.yaml"))
    assert isinstance(recipe, ClassificationRecipe)
    assert recipe == ClassificationRecipe()


@pytest.mark.parametrize(("name", "parameters"), [("b16", 111_907_840), ("l16", 329_541_888), ("h14", 657_074_508)])
def test_the_papers_models_have_their_published_sizes(name: str, parameters: int) -> None:
    """Elements of the published full checkpoints, the frozen tables included."""
    recipe = load_recipe(next(path for path in RECIPES if path.stem == f"pretrain_vit_{name}"))
    with torch.device("meta"):
        state = MAE(recipe.model).state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == parameters


def test_the_paper_s_pretraining_is_the_default_and_the_base_recipe() -> None:
    assert load_recipe(RECIPES[0].with_name("pretrain.yaml")) == Recipe()


TABLE_1: dict[str, dict[str, Any]] = {
    "default": {"model.target": "pixel"},
    **{f"decoder_depth_{depth}": {"model.decoder_depth": depth} for depth in (1, 2, 4, 12)},
    **{f"decoder_width_{width}": {"model.decoder_dim": width} for width in (128, 256, 768, 1024)},
    "encoder_mask_tokens": {"model.encoder_mask_tokens": True},
    "augment_none": {"data.crop.kind": "none"},
    "augment_fixed_size": {"data.crop.kind": "fixed_size"},
    "augment_jitter": {"data.crop.jitter": 0.4},
    "mask_block_50": {"model.mask": "block", "model.mask_ratio": 0.5},
    "mask_block_75": {"model.mask": "block"},
    "mask_grid_75": {"model.mask": "grid"},
}


@pytest.mark.parametrize("name", TABLE_1)
def test_a_row_of_table_1_differs_from_its_base_only_where_the_paper_does(name: str) -> None:
    recipe = load_recipe(RECIPES[0].with_name(f"table1_{name}.yaml"))
    base = load_recipe(RECIPES[0].with_name("pretrain_vit_l16.yaml" if name == "default" else "table1_default.yaml"))
    assert set(differing_keys(base, recipe)) == set(TABLE_1[name])
    for key, value in TABLE_1[name].items():
        assert functools.reduce(getattr, key.split("."), recipe) == value
    assert (recipe.optim.epochs, recipe.model.dim, recipe.model.depth) == (800, 1024, 24)
    assert recipe.engine == base.engine


def test_every_recipe_of_table_1_stands_in_the_readme_with_its_two_numbers() -> None:
    readme = RECIPES[0].with_name("README.md").read_text()
    for path in (path for path in RECIPES if path.stem.startswith("table1_")):
        numbers = re.findall(r"\b\d\d\.\d\b", path.read_text().split("base:")[0])
        assert len(numbers) == 2
        assert f"| `{path.name}` | {' | '.join(numbers)} |" in readme


def test_a_recipe_overrides_single_keys_of_its_base(tmp_path: Path) -> None:
    recipe_file(tmp_path, "optim: {batch_size: 128, epochs: 90}\nseed: 3\n", "base.yaml")
    recipe = load_recipe(recipe_file(tmp_path, "base: base.yaml\noptim: {batch_size: 256}\n"))
    assert (recipe.optim.batch_size, recipe.optim.epochs, recipe.seed) == (256, 90.0, 3)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 takes `1e-4`, without a point, for a string."""
    assert load_recipe(recipe_file(tmp_path, "optim: {base_lr: 1e-4}")).optim.base_lr == 1e-4


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("optim: {batchsize: 4}", "unknown key optim.batchsize; the nearest is optim.batch_size"),
        ("modle: {}", "unknown key modle; the nearest is model"),
        ("model: {depth: deep}", "model.depth: .*integer.*'deep'"),
        ("model: {patch_size: 15}", "not divisible by patch_size 15"),
        ("model: 3", "model must hold keys, not the value 3"),
        ("optim: {epochs: 3, warmup_epochs: 3}", "warmup_epochs"),
        ("engine: {precision: fp16}", "precision.*'bf16' or 'fp32'"),
        ("engine: {zero: 3, compile: true}", "compile does not work with zero 3"),
        ("engine: {zero: 4}", "engine.zero"),
        ("optim: {clip_grad: -1}", "clip_grad -1.0 is negative"),
        ("health: {spike: 1}", "spike above 1"),
        ("- a", "a recipe is a mapping"),
        ("a: b: c", "is not YAML"),
        ("base: none.yaml", "none.yaml cannot be read"),
        ("base: mine.yaml", "leads back to itself"),
    ],
)
def test_a_wrong_recipe_gets_one_clear_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint) as caught:
        load_recipe(recipe_file(tmp_path, text))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_misspelt_recipe_is_told_the_nearest_one(tmp_path: Path) -> None:
    recipe_file(tmp_path, "", "pretrain_vit_b16.yaml")
    with pytest.raises(RecipeError, match=r"did you mean .*pretrain_vit_b16\.yaml"):
        load_recipe(tmp_path / "pretrain_vitb16.yaml")


def test_only_the_experiment_is_compared_when_a_run_goes_on(tmp_path: Path) -> None:
    old = load_recipe(recipe_file(tmp_path, "{}"))
    other_hardware = load_recipe(recipe_file(tmp_path, "engine: {micro_batch_size: 8}\nlog: {every_steps: 1}"))
    other_experiment = load_recipe(recipe_file(tmp_path, "optim: {epochs: 100}\nmodel: {depth: 2}"))
    assert differing_keys(old, other_hardware) == {}
    assert differing_keys(old, other_experiment) == {"model.depth": (12, 2), "optim.epochs": (800.0, 100.0)}


def test_a_run_goes_on_with_another_schedule_when_allowed_and_never_with_another_model(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start(load_recipe(recipe_file(tmp_path, "{}")), 0)
    longer = load_recipe(recipe_file(tmp_path, "optim: {epochs: 900}"))
    with pytest.raises(
        RecipeError, match=r"another optim.epochs \(800.0, now 900.0\).*--allow optim.epochs, or another"
    ):
        folder.check_same_experiment(longer, ())
    folder.check_same_experiment(longer, ("optim.epochs",))
    with pytest.raises(RecipeError, match="--allow seed: a run keeps it for life"):
        folder.check_same_experiment(longer, ("optim.epochs", "seed"))
    other = load_recipe(recipe_file(tmp_path, "model: {depth: 2}\noptim: {epochs: 900}"))
    with pytest.raises(RecipeError, match=r"model.depth \(12, now 2\)(?!.*--allow)"):
        folder.check_same_experiment(other, ("optim.epochs",))


def test_longer_recipes_differ_from_their_base_in_epochs_alone() -> None:
    for path in RECIPES:
        if found := re.fullmatch(r"(figure7|pretrain_vit_.*)_(100|200|400|1600)", path.stem):
            base = "table1_default" if found[1] == "figure7" else found[1]
            differences = differing_keys(load_recipe(path.with_stem(base)), load_recipe(path))
            assert differences == {"optim.epochs": (800.0, float(found[2]))}, path
