"""Grids: the rows of a table of runs, and the recipe of each row.

A row sets keys of a recipe; a row of Table 1 also holds the two numbers of the paper. `key=a,b,c` is a grid of one
key. A file such as those of recipes/grids/ names its rows, may set several keys per row, may name the recipe that it
changes (`base`) and the evaluations of every run (`then`). A sweep runs every combination of the rows of several grids
and the seeds.
"""

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from maelstream.jobs.recipe import (
    RECIPES,
    Recipe,
    RecipeError,
    first_error,
    load_recipe,
    merged_values,
    nested_values,
    read_values,
    recipe_file,
    resolve,
)
from maelstream.jobs.yaml_files import YamlError, parse_yaml, read_yaml

GRIDS = RECIPES / "grids"


@dataclass(frozen=True)
class Row:
    """One row of a table: the values that it sets, and the paper's results."""

    name: str
    set: dict[str, Any] = field(default_factory=dict)
    """Dotted keys of the recipe with their values."""
    finetune: float | None = None
    """The paper's top-1 of this row after fine-tuning, in percent (ViT-L)."""
    linprobe: float | None = None
    """The paper's top-1 of this row by linear probing, in percent (ViT-L)."""


@dataclass(frozen=True)
class Grid:
    """Rows, and what they have in common."""

    title: str
    rows: tuple[Row, ...]
    then: tuple[str, ...] = ()
    """Evaluations of every run, written as for `--then`."""
    base: str = ""
    """The recipe that the rows change, relative to the grid's file; `maelstream pretrain GRID --row NAME` needs it."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    row: str
    """The row's name; with several grids, the names of their rows joined."""
    setting: dict[str, Any]
    """Dotted keys of the recipe with the values that the rows set."""
    seed: int
    recipe: Recipe
    paper: dict[str, float]
    """The paper's top-1 by job, in percent."""

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        return f"{slug(self.row)}_seed-{self.seed}"


def slug(text: str) -> str:
    """`text` as a file name: every other character than letters, digits, dots and hyphens becomes a hyphen."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip(".").rstrip("-")


def grid_of(text: str) -> Grid:
    """The grid that an option names: `key=a,b,c`, a file, or the name of one in recipes/grids/.

    Raises:
        RecipeError: there is no such grid, it is empty, it repeats a value, or it cannot be parsed.
    """
    key, mark, listed = text.partition("=")
    if not mark:
        return read_grid(_path_of(text))
    try:
        values = parse_yaml(f"[{listed}]")
    except YamlError:
        raise RecipeError(f"--grid {text}: {listed!r} cannot be read; write key=a,b,c, as values of a recipe") from None
    if not values:
        raise RecipeError(f"--grid {text} has no values; write {key}=a,b,c")
    name = key.rpartition(".")[2]
    rows = tuple(Row(f"{name}={_value_text(value)}", {key: value}) for value in values)
    return _checked(Grid(key, rows), f"--grid {text}")


def read_grid(path: Path) -> Grid:
    """The grid in a file; raises RecipeError as `grid_of` does."""
    try:
        grid = TypeAdapter(Grid).validate_python(read_yaml(path))
    except YamlError as error:
        raise RecipeError(f"grid {path} cannot be read ({error})") from None
    except ValidationError as error:
        raise RecipeError(f"{path}: {first_error(error)}; a grid has title, rows (name, set), then and base") from None
    if not grid.rows:
        raise RecipeError(f"{path} has no rows")
    return _checked(grid, str(path))


def load_recipe_or_row(path: Path, row: str | None) -> Recipe:
    """The recipe in a file or of a name, or, of a file that holds a grid, the recipe of one row.

    Raises:
        RecipeError: the file is a grid and `row` is None, or `recipe_of_row` or `load_recipe` raises it.
    """
    if row is not None:
        return recipe_of_row(recipe_file(path), row)
    if recipe_file(path).exists() and "rows" in read_values(path):
        raise RecipeError(f"{path} is a grid; name one of its rows with --row: {_names(read_grid(recipe_file(path)))}")
    return load_recipe(path)


def recipe_of_row(path: Path, row: str) -> Recipe:
    """The recipe of one row of the grid in a file: the values that the row sets, laid over the grid's `base`.

    Args:
        row: the row's name, its name as a file name (`crop-random-size`), or the value of the only key that it sets.

    Raises:
        RecipeError: the file is no grid or names no base, there is no such row, or its values make no recipe.
    """
    grid = read_grid(path)
    if not grid.base:
        raise RecipeError(f"{path} names no recipe as its `base:`; use it with `maelstream sweep RECIPE --grid {path}`")
    for names in (lambda each: [each.name], lambda each: [slug(each.name)], _only_value):
        for each in grid.rows:
            if row in names(each):
                base = asdict(load_recipe(path.parent / grid.base))
                return resolve(merged_values(base, nested_values(each.set)), f"{path}, row {each.name}")
    raise RecipeError(f"{path} has no row {row!r}; its rows are {_names(grid)}")


def cells_of(recipe: Recipe, grids: Sequence[Grid], seeds: Sequence[int]) -> list[Cell]:
    """Every combination of the grids' rows and the seeds, in order.

    Raises:
        RecipeError: an unknown key (the message names the nearest one), an invalid value, or the same cell twice.
    """
    if not seeds:
        raise RecipeError("--seeds names no seed; write --seeds 0,1,2")
    cells: list[Cell] = []
    for rows, seed in itertools.product(itertools.product(*(grid.rows for grid in grids)), seeds):
        name = ", ".join(row.name for row in rows) or "the recipe"
        setting: dict[str, Any] = {}
        for row in rows:
            if both := sorted(row.set.keys() & setting.keys()):
                raise RecipeError(f"two grids set {both[0]}; each key belongs to one")
            setting |= row.set
        if "seed" in setting:
            raise RecipeError("a grid does not set seed; write --seeds 0,1,2")
        nested = merged_values(asdict(recipe), nested_values(setting | {"seed": seed}))
        paper = _paper_results(rows[0]) if len(rows) == 1 else {}
        cells.append(Cell(name, setting, seed, resolve(nested, f"cell {name}"), paper))
    for index, cell in enumerate(cells):
        for other in cells[:index]:
            if other.recipe == cell.recipe or other.folder == cell.folder:
                raise RecipeError(
                    f"{other.row} and {cell.row}, seed {cell.seed}, are the same cell twice; leave one out"
                )
    return cells


def _path_of(text: str) -> Path:
    known = {path.stem: path for path in sorted(GRIDS.glob("*.yaml"))}
    if text in known:
        return known[text]
    if text.endswith((".yaml", ".yml")):
        return Path(text)
    near = difflib.get_close_matches(text, known, 1)
    hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
    raise RecipeError(
        f"--grid {text} is not key=a,b,c, not a file, and not a grid of {GRIDS.parent.name}/{GRIDS.name}{hint}"
    )


def _checked(grid: Grid, where: str) -> Grid:
    if repeated := [name for name, count in Counter(row.name for row in grid.rows).items() if count > 1]:
        raise RecipeError(f"{where} has {repeated[0]} twice; leave one out")
    return grid


def _names(grid: Grid) -> str:
    return ", ".join(f'"{row.name}"' if " " in row.name else row.name for row in grid.rows)


def _only_value(row: Row) -> list[str]:
    return [_value_text(value) for value in row.set.values()] if len(row.set) == 1 else []


def _value_text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _paper_results(row: Row) -> dict[str, float]:
    known = {"finetune": row.finetune, "linprobe": row.linprobe}
    return {job: value for job, value in known.items() if value is not None}
