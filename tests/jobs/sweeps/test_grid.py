"""Grids: values and names become cells, the shipped grids are the paper's tables, and each error is one line."""

from pathlib import Path
from typing import Any

import pytest

from maelstream.jobs.recipe import Recipe, RecipeError, differing_keys, load_recipe
from maelstream.jobs.sweeps.grid import (
    GRIDS,
    Grid,
    Row,
    cells_of,
    grid_of,
    load_recipe_or_row,
    read_grid,
    recipe_of_row,
)
from maelstream.jobs.sweeps.sweeping import steps_of

DEFAULT = GRIDS.parent / "pretrain" / "vit_l16_pixels.yaml"
TABLE_1: dict[str, list[dict[str, Any]]] = {
    "decoder_depth": [{"model.decoder_depth": n} if n != 8 else {} for n in (1, 2, 4, 8, 12)],
    "decoder_width": [{"model.decoder_dim": n} if n != 512 else {} for n in (128, 256, 512, 768, 1024)],
    "mask_tokens": [{"model.encoder_mask_tokens": True}, {}],
    "targets": [{}, *({"model.target": target} for target in ("normalised_pixel", "pca", "token"))],
    "augmentation": [{"data.crop.kind": "none"}, {"data.crop.kind": "fixed_size"}, {}, {"data.crop.jitter": 0.4}],
    "masks": [{}, {"model.mask": "block", "model.mask_ratio": 0.5}, {"model.mask": "block"}, {"model.mask": "grid"}],
}
"""The keys of each row that differ from the default of Table 1, with their values."""


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
def test_a_row_of_table_1_differs_from_the_default_only_where_the_paper_does(name: str) -> None:
    default = load_recipe(DEFAULT)
    cells = cells_of(default, [grid_of(name)], [default.seed])
    for cell, differences in zip(cells, TABLE_1[name], strict=True):
        found = {key: new for key, (_, new) in differing_keys(default, cell.recipe).items()}
        assert found == differences
        assert cell.recipe.engine == default.engine and cell.paper.keys() == {"finetune", "linprobe"}
        assert recipe_of_row(GRIDS / f"{name}.yaml", cell.row) == cell.recipe


def test_the_targets_that_need_a_file_name_it() -> None:
    pixel, normalised, pca, token = (cell.recipe for cell in cells_of(load_recipe(DEFAULT), [grid_of("targets")], [0]))
    assert pixel.target_file == normalised.target_file == ""
    assert (pca.target_file, pca.model.components) == ("data/pca.safetensors", 96)
    assert (token.target_file, token.model.codes) == ("data/tokenizer.safetensors", 8192)


GRID = """
title: depth
base: base.yaml
rows:
  - {name: "two blocks", set: {model.depth: 2}}
  - {name: "4", set: {model.depth: 4, seed: 7}}
  - {name: "small", set: {model.image_size: [32, 32]}}
  - {name: "wrong", set: {model.depth: deep}}
"""


def test_a_row_is_found_by_its_name_its_file_name_or_its_only_value(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(GRID)
    (tmp_path / "base.yaml").write_text("optim: {epochs: 50}\n")
    by_name = [recipe_of_row(path, row) for row in ("two blocks", "two-blocks", "2")]
    assert by_name[0] == by_name[1] == by_name[2] == load_recipe_or_row(path, "2")
    assert (by_name[0].model.depth, by_name[0].optim.epochs) == (2, 50)
    assert (recipe_of_row(path, "4").model.depth, recipe_of_row(path, "4").seed) == (4, 7)
    assert recipe_of_row(path, "32x32").model.image_size == (32, 32)


@pytest.mark.parametrize(
    ("text", "row", "complaint"),
    [
        (GRID, "3", r"has no row '3'; its rows are \"two blocks\", 4, small, wrong"),
        (GRID, None, r"is a grid; name one of its rows with --row: \"two blocks\", 4, small, wrong"),
        (GRID, "wrong", "row wrong: model.depth: .*integer.*'deep'"),
        (GRID.replace("base: base.yaml", ""), "4", "names no recipe as its `base:`; use it with `maelstream sweep"),
        (GRID.replace("base.yaml", "no.yaml"), "4", "recipe .*no.yaml cannot be read"),
        ("model: {depth: 2}", "2", "title: Field required; a grid has title, rows"),
    ],
)
def test_a_row_that_cannot_be_run_gets_one_line(tmp_path: Path, text: str, row: str | None, complaint: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    (tmp_path / "base.yaml").write_text("{}")
    with pytest.raises(RecipeError, match=complaint) as error:
        load_recipe_or_row(path, row)
    assert "\n" not in str(error.value)


def test_every_shipped_grid_makes_cells_and_its_evaluations_are_known() -> None:
    recipe = load_recipe(DEFAULT.with_name("vit_l16.yaml"))
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
def test_an_invalid_grid_gets_one_line(grids: list[str], complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint) as error:
        cells_of(Recipe(), [grid_of(text) for text in grids], [0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("title: x\nrows: []", "has no rows"),
        ("rows: [{name: a}]", "title: .*a grid has title, rows"),
        ("title: x\nrows: [{name: a}, {name: a}]", "has a twice"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_an_error_names_the_grid_file(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=complaint):
        grid_of(str(path))


def test_the_same_cell_twice_is_an_error_under_any_name() -> None:
    grid = Grid("x", (Row("a", {"model.depth": 2}), Row("b", {"model.depth": 2})))
    with pytest.raises(RecipeError, match="a and b, seed 0, are the same cell twice"):
        cells_of(Recipe(), [grid], [0])
    with pytest.raises(RecipeError, match="same cell twice"):
        cells_of(Recipe(), [], [1, 1])
