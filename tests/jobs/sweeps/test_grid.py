"""Grids: values and names become cells, the shipped ones are Table 1's recipes, and what makes no sense is one line."""

from pathlib import Path

import pytest

from maelstream.jobs.recipe import Recipe, RecipeError, differing_keys, load_recipe
from maelstream.jobs.sweep import steps_of
from maelstream.jobs.sweeps.grid import GRIDS, Grid, Row, cells_of, grid_of, read_grid

RECIPES = GRIDS.parent
DEFAULT = "table1_default"
TABLE_1 = {
    "decoder_depth": [f"table1_decoder_depth_{n}" if n != 8 else DEFAULT for n in (1, 2, 4, 8, 12)],
    "decoder_width": [f"table1_decoder_width_{n}" if n != 512 else DEFAULT for n in (128, 256, 512, 768, 1024)],
    "mask_tokens": ["table1_encoder_mask_tokens", DEFAULT],
    "targets": [DEFAULT, "pretrain_vit_l16", "table1_target_pca", "table1_target_token"],
    "augmentation": ["table1_augment_none", "table1_augment_fixed_size", DEFAULT, "table1_augment_jitter"],
    "masks": [DEFAULT, "table1_mask_block_50", "table1_mask_block_75", "table1_mask_grid_75"],
}


def test_values_multiply_and_every_cell_has_its_own_recipe_and_folder() -> None:
    grids = [grid_of("model.mask_ratio=0.5,0.75"), grid_of("model.image_size=[32, 32],[64, 64]")]
    cells = cells_of(Recipe(), grids, [0, 3])
    assert len(cells) == len({cell.folder for cell in cells}) == 8
    assert [cell.seed for cell in cells[:2]] == [0, 3] and cells[1].recipe.seed == 3
    last = cells[-1]
    assert last.setting == {"model.mask_ratio": 0.75, "model.image_size": [64, 64]}
    assert (last.recipe.model.mask_ratio, last.recipe.model.image_size) == (0.75, (64, 64))
    assert last.folder == "mask-ratio-0.75-image-size-64x64_seed-3"
    assert cells_of(Recipe(), [grid_of("optim.base_lr=1e-4,2.0e-4")], [0])[0].recipe.optim.base_lr == 1e-4


@pytest.mark.parametrize("name", TABLE_1)
def test_the_grids_of_table_1_are_its_recipes_with_its_numbers(name: str) -> None:
    default = load_recipe(RECIPES / "table1_default.yaml")
    cells = cells_of(default, [grid_of(name)], [0])
    readme = (RECIPES / "README.md").read_text()
    assert len(cells) == len(TABLE_1[name])
    for cell, file in zip(cells, TABLE_1[name], strict=True):
        assert differing_keys(cell.recipe, load_recipe(RECIPES / f"{file}.yaml")) == {}
        assert cell.recipe.target_file == load_recipe(RECIPES / f"{file}.yaml").target_file
        assert f"| `{file}.yaml` | {cell.paper['finetune']} | {cell.paper['linprobe']} |" in readme


def test_every_shipped_grid_makes_cells_and_its_evaluations_are_known() -> None:
    recipe = load_recipe(RECIPES / "pretrain_vit_l16.yaml")
    for path in sorted(GRIDS.glob("*.yaml")):
        grid = read_grid(path)
        assert len(cells_of(recipe, [grid], [0])) * max(1, len(steps_of(grid.then))) > 1, path
    assert (
        len(read_grid(GRIDS / "mask_ratio.yaml").rows) == 10 and len(read_grid(GRIDS / "partial_blocks.yaml").then) == 9
    )


@pytest.mark.parametrize(
    ("grids", "complaint"),
    [
        (["model.mask_rato=0.5"], "unknown key model.mask_rato; the nearest is model.mask_ratio"),
        (["modle.depth=1"], "unknown key modle; the nearest is model"),
        (["model.depth=deep"], "cell depth=deep: model.depth: .*integer.*'deep'"),
        (["model.mask_ratio=0.5,[1"], "cannot be read; write key=a,b,c"),
        (["model.depth="], "has no values"),
        (["model.depth=2,2"], "has depth=2 twice"),
        (["optim.base_lr=1,1.0"], "are the same cell twice"),
        (["model.depth=2,4", "model.depth=6"], "two grids set model.depth"),
        (["seed=1,2"], "a grid does not set seed"),
        (["decoder_deph"], "did you mean decoder_depth"),
        (["zzz"], "known are augmentation"),
        (["no/such.yaml"], "no/such.yaml cannot be read"),
    ],
)
def test_a_grid_that_makes_no_sense_is_one_line(grids: list[str], complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint) as refused:
        cells_of(Recipe(), [grid_of(text) for text in grids], [0])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("title: x\nrows: []", "has no rows"),
        ("rows: [{name: a}]", "title: .*a grid has title, rows"),
        ("title: x\nrows: [{name: a}, {name: a}]", "has a twice"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_a_bad_grid_file_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=complaint):
        grid_of(str(path))


def test_the_same_cell_twice_is_refused_whatever_it_is_called() -> None:
    grid = Grid("x", (Row("a", {"model.depth": 2}), Row("b", {"model.depth": 2})))
    with pytest.raises(RecipeError, match="a and b, seed 0, are the same cell twice"):
        cells_of(Recipe(), [grid], [0])
    with pytest.raises(RecipeError, match="same cell twice"):
        cells_of(Recipe(), [], [1, 1])
