"""Recipes override their base, every key is checked, and a round trip through YAML changes nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maelstream.jobs.evaluation.classification import model_of
from maelstream.jobs.recipe import (
    ClassificationRecipe,
    Recipe,
    RecipeError,
    check_kind,
    differing_keys,
    dump_recipe,
    flat_values,
    load_any_recipe,
    load_recipe,
    merged_values,
    named_recipes,
    nested_values,
    read_values,
)
from maelstream.jobs.sweeps.grid import load_recipe_or_row
from maelstream.jobs.training.trainer import schedule_of
from maelstream.model.mae import MAE

FOLDER = Path(__file__).parents[2] / "recipes"
EVERY = [
    path for job in ("pretrain", "finetune", "linprobe", "scratch") for path in sorted((FOLDER / job).glob("*.yaml"))
]
LABELLED = [path for path in EVERY if "job" in read_values(path)]
RECIPES = [path for path in EVERY if path not in LABELLED]


def recipe_file(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_parses_and_builds(path: Path) -> None:
    recipe = load_recipe(path)
    with torch.device("meta"):  # shapes without memory: ViT-H is 2.6 GB
        model = MAE(recipe.model)
    assert sum(parameter.numel() for parameter in model.parameters()) > 10_000
    assert schedule_of(recipe, 1_281_167).total_steps > 0


@pytest.mark.parametrize("path", EVERY, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_dumped_recipe_loads_as_the_same_recipe(path: Path, tmp_path: Path) -> None:
    recipe = load_any_recipe(path)
    assert load_any_recipe(recipe_file(tmp_path, dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("path", LABELLED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_on_labels_parses_and_builds(path: Path) -> None:
    recipe = load_any_recipe(path)
    assert isinstance(recipe, ClassificationRecipe)
    with torch.device("meta"):
        model = model_of(replace(recipe, weights=""), None)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    probed = recipe.model.dim * recipe.model.classes + recipe.model.classes
    assert trained == probed if recipe.tuning.probe else trained > 50_000_000


# recipes.md: base lr, epochs, warm-up, batch, weight decay, layer decay, drop path
LABELLED_TABLE = {
    "finetune/vit_b16": (5e-4, 100, 5, 1024, 0.05, 0.65, 0.1),
    "finetune/vit_l16": (1e-3, 50, 5, 1024, 0.05, 0.75, 0.2),
    "finetune/vit_h14": (1e-3, 50, 5, 1024, 0.05, 0.75, 0.3),
    "finetune/vit_h14_448": (1e-3, 50, 5, 1024, 0.05, 0.75, 0.3),
    "linprobe/vit_b16": (0.1, 90, 10, 16384, 0, 1, 0),
    "linprobe/vit_l16": (0.1, 50, 10, 16384, 0, 1, 0),
    "linprobe/vit_h14": (0.1, 50, 10, 16384, 0, 1, 0),
    "scratch/vit_b16": (1e-4, 300, 20, 4096, 0.3, 1, 0.1),
    "scratch/vit_l16": (1e-4, 200, 20, 4096, 0.3, 1, 0.2),
    "scratch/vit_h14": (1e-4, 200, 20, 4096, 0.3, 1, 0.2),
}


@pytest.mark.parametrize("name", LABELLED_TABLE)
def test_recipes_on_labels_have_the_papers_numbers(name: str) -> None:
    recipe = load_any_recipe(FOLDER / f"{name}.yaml")
    assert isinstance(recipe, ClassificationRecipe)
    optim, tuning = recipe.optim, recipe.tuning
    numbers = (optim.base_lr, optim.epochs, optim.warmup_epochs, optim.batch_size, optim.weight_decay)
    assert (*numbers, tuning.layer_decay, recipe.model.drop_path) == LABELLED_TABLE[name]
    mixed = (0, 0, 0) if recipe.job == "linprobe" else (0.8, 1.0, 0.1)
    assert (recipe.mixup.mixup, recipe.mixup.cutmix, recipe.mixup.label_smoothing) == mixed
    assert tuning.optimizer == ("lars" if recipe.job == "linprobe" else "adamw")
    assert tuning.ema == (0.9999 if recipe.job == "scratch" else 0)


def test_the_default_values_for_labels_are_those_of_fine_tuning_vit_b16() -> None:
    recipe = load_any_recipe(FOLDER / "finetune/vit_b16.yaml")
    assert isinstance(recipe, ClassificationRecipe)
    assert recipe == ClassificationRecipe()


@pytest.mark.parametrize(("name", "parameters"), [("b16", 111_907_840), ("l16", 329_541_888), ("h14", 657_074_508)])
def test_the_papers_models_have_their_published_sizes(name: str, parameters: int) -> None:
    """Elements of the published full checkpoints, including the frozen position tables."""
    recipe = load_recipe(FOLDER / f"pretrain/vit_{name}.yaml")
    with torch.device("meta"):
        state = MAE(recipe.model).state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == parameters


def test_the_default_values_are_those_of_the_base_recipe() -> None:
    assert load_recipe(FOLDER / "pretrain/base.yaml") == Recipe()


def test_the_default_of_table_1_differs_from_vit_l16_only_in_its_target() -> None:
    recipe, base = (load_recipe(FOLDER / f"pretrain/{name}.yaml") for name in ("vit_l16_pixels", "vit_l16"))
    assert differing_keys(base, recipe) == {"model.target": ("normalised_pixel", "pixel")}
    assert (recipe.optim.epochs, recipe.model.dim, recipe.model.depth) == (800, 1024, 24)
    assert recipe.engine == base.engine


def test_a_recipe_overrides_single_keys_of_its_base(tmp_path: Path) -> None:
    recipe_file(tmp_path, "optim: {batch_size: 128, epochs: 90}\nseed: 3\n", "base.yaml")
    recipe = load_recipe(recipe_file(tmp_path, "base: base.yaml\noptim: {batch_size: 256}\n"))
    assert (recipe.optim.batch_size, recipe.optim.epochs, recipe.seed) == (256, 90.0, 3)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    """In YAML 1.1 `1e-4`, without a point, is a string."""
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
        ("health: {spike: 1}", "spike 1.0 above 1"),
        ("- a", "a recipe is a mapping"),
        ("a: b: c", "is not YAML"),
        ("base: none.yaml", "none.yaml cannot be read"),
        ("base: mine.yaml", "leads back to itself"),
    ],
)
def test_the_error_for_a_wrong_recipe_is_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint) as caught:
        load_recipe(recipe_file(tmp_path, text))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_recipe_has_a_name_in_any_folder_and_as_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {path.resolve() for path in named_recipes().values()} >= set(EVERY)
    assert load_recipe(Path("pretrain_vit_l16")) == load_recipe(named_recipes()["pretrain_vit_l16"])
    Path("mine.yaml").write_text("base: pretrain_vit_l16\nseed: 3\n")
    assert load_recipe(Path("mine.yaml")) == replace(load_recipe(Path("pretrain_vit_l16")), seed=3)
    assert load_recipe_or_row(Path("grids_decoder_depth"), "4").model.decoder_depth == 4


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("pretrain_vit_b61", "did you mean pretrain_vit_b16?"),
        ("nothing-like-it", "the named recipes are .*, pretrain_vit_b16, "),
        ("recipes/pretrain/vit_b16.yaml", "the recipe that ships with maelstream is named pretrain_vit_b16"),
    ],
)
def test_a_name_that_does_not_exist_gets_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=hint):
        load_recipe(Path(given))


@pytest.mark.parametrize(
    ("schema", "text", "complaint"),
    [
        (
            Recipe,
            "base: finetune_vit_b16",
            "is a recipe of finetune; use it with `maelstream finetune WEIGHTS TRAIN VAL",
        ),
        (Recipe, "base: scratch_vit_b16", "is a recipe of scratch; use it with `maelstream scratch TRAIN VAL --recipe"),
        (
            ClassificationRecipe,
            "base: pretrain_vit_b16",
            "is a recipe of pretrain; .* of this kind are finetune_base, ",
        ),
        (ClassificationRecipe, "data: {dataset: a}", "is a recipe of pretrain; use it with `maelstream pretrain"),
        (ClassificationRecipe, "data: {datasets: a}", "unknown key data.datasets"),
        (Recipe, "base: grids_masks", "is a grid, not a recipe; use it with `maelstream pretrain .* --row NAME`"),
        (ClassificationRecipe, "base: grids_masks", "is a grid, not a recipe"),
    ],
)
def test_a_recipe_of_another_kind_says_what_it_is(tmp_path: Path, schema: type, text: str, complaint: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=complaint) as caught:
        check_kind(read_values(path), schema, str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("optim: {batch_size: 0}", "mine.yaml: optim: batch_size 0 is not positive"),
        ("model: {depth: 0}", "mine.yaml: model: depth 0 must be at least 1"),
        ("model: {image_size: [0, 224]}", "mine.yaml: model: image_size (0, 224) must be at least 1"),
        ("model: {decoder_heads: 0}", "mine.yaml: model: decoder_heads 0 must be at least 1"),
        ("engine: {zero: 7}", "mine.yaml: engine.zero: Input should be 1, 2 or 3 (found 7)"),
    ],
)
def test_the_error_for_a_wrong_value_names_the_key_and_no_other_value(
    tmp_path: Path, text: str, complaint: str
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "mine.yaml")
    assert str(caught.value) == f"{tmp_path}/{complaint}"


def test_dotted_keys_and_nested_values_are_inverse() -> None:
    nested = {"model": {"dim": 3, "mask": "grid"}, "seed": 1}
    flat = {"model.dim": 3, "model.mask": "grid", "seed": 1}
    assert flat_values(nested) == flat and nested_values(flat) == nested


def test_merged_values_replace_single_keys_and_change_neither_argument() -> None:
    base, values = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}, "e": {"f": 5}}
    assert merged_values(base, values) == {"a": {"b": 1, "c": 4}, "d": 3, "e": {"f": 5}}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3} and values == {"a": {"c": 4}, "e": {"f": 5}}


def test_the_error_for_a_misspelt_recipe_names_the_nearest_file(tmp_path: Path) -> None:
    recipe_file(tmp_path, "", "vit_b16.yaml")
    with pytest.raises(RecipeError, match=r"did you mean .*vit_b16\.yaml"):
        load_recipe(tmp_path / "vitb16.yaml")


def test_only_the_keys_of_the_experiment_are_compared(tmp_path: Path) -> None:
    old = load_recipe(recipe_file(tmp_path, "{}"))
    other_hardware = load_recipe(recipe_file(tmp_path, "engine: {micro_batch_size: 8}\nlog: {every_steps: 1}"))
    other_experiment = load_recipe(recipe_file(tmp_path, "optim: {epochs: 100}\nmodel: {depth: 2}"))
    assert differing_keys(old, other_hardware) == {}
    assert differing_keys(old, other_experiment) == {"model.depth": (12, 2), "optim.epochs": (800.0, 100.0)}


def test_longer_recipes_differ_from_their_base_only_in_epochs() -> None:
    longer = sorted((FOLDER / "pretrain").glob("*_1600.yaml"))
    assert len(longer) == 3
    for path in longer:
        shorter = path.with_stem(path.stem.removesuffix("_1600"))
        assert differing_keys(load_recipe(shorter), load_recipe(path)) == {"optim.epochs": (800.0, 1600.0)}
