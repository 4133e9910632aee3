"""Table 6's recipes: fine-tuning's own, with the paper's numbers beside them."""

import re
from pathlib import Path

import pytest

from maelstream.jobs.recipe import ClassificationRecipe, read_values, resolve_as

RECIPES = Path(__file__).parents[2] / "recipes"
TABLE_6 = {
    "inat2017": "70.5 | 75.7 | 79.3 | 83.4",
    "inat2018": "75.4 | 80.1 | 83.0 | 86.8",
    "inat2019": "80.5 | 83.4 | 85.7 | 88.3",
    "places205": "63.9 | 65.8 | 65.9 | 66.8",
    "places365": "57.9 | 59.4 | 59.8 | 60.3",
}


@pytest.mark.parametrize("data", TABLE_6)
def test_every_column_of_table_6_is_a_recipe_of_the_same_fine_tuning(data: str) -> None:
    sizes, numbers = ("vit_b16", "vit_l16", "vit_h14", "vit_h14_448"), TABLE_6[data].split(" | ")
    for size, number in zip(sizes, numbers, strict=True):
        path = RECIPES / f"table6_{data}_{size}.yaml"
        assert re.findall(r": (\d\d\.\d) top-1", path.read_text()) == [number]
        recipe = resolve_as(ClassificationRecipe, read_values(path), str(path))
        base = RECIPES / f"finetune_{size}.yaml"
        assert recipe == resolve_as(ClassificationRecipe, read_values(base), str(base))
    assert f"| `table6_{data}_*.yaml` | {TABLE_6[data]} |" in (RECIPES / "README.md").read_text()
