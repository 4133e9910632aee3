"""Grids: what a sweep varies, and the cells that come of it.

A grid is a list of rows; a row sets keys of the recipe, and where it is one of the paper's Table 1 it knows the paper's
two numbers. `key=a,b,c` is a grid of one key; recipes/grids/NAME.yaml holds one with names, several keys a row, or
evaluations (`then`). Several grids multiply, and so do seeds.
"""

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from maelstream.jobs.recipe import RECIPES, Recipe, RecipeError, merged_values, nested_values, resolve

GRIDS = RECIPES / "grids"


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    name: str
    set: dict[str, Any] = field(default_factory=dict)
    """Dotted keys of the recipe with their values."""
    finetune: float | None = None
    """The paper's top-1 of this row in percent, ViT-L; so is `linprobe`."""
    linprobe: float | None = None


@dataclass(frozen=True)
class Grid:
    title: str
    rows: tuple[Row, ...]
    then: tuple[str, ...] = ()
    """Evaluations of every cell, as `--then` has them."""


@dataclass(frozen=True)
class Cell:
    """A run of a sweep."""

    row: str
    """Its row's name; those of several grids joined."""
    setting: dict[str, Any]
    seed: int
    recipe: Recipe
    paper: dict[str, float]
    """The paper's top-1 by job."""

    @property
    def folder(self) -> str:
        """Name of its run's folder."""
        return f"{slug(self.row)}_seed-{self.seed}"


def slug(text: str) -> str:
    """A name for a file."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip(".").rstrip("-")


def grid_of(text: str) -> Grid:
    """The grid that an option names: `key=a,b,c`, a file, or the name of one in recipes/grids/.

    Raises:
        RecipeError: no such grid, nothing in it, a value twice, or what cannot be read.
    """
    key, mark, listed = text.partition("=")
    if not mark:
        return read_grid(_path_of(text))
    try:
        values = yaml.safe_load(f"[{listed}]")
    except yaml.YAMLError:
        raise RecipeError(f"--grid {text}: {listed!r} cannot be read; write key=a,b,c, as values of a recipe") from None
    if not values:
        raise RecipeError(f"--grid {text} has no values; write {key}=a,b,c")
    name = key.rpartition(".")[2]
    rows = tuple(Row(f"{name}={_shown(value)}", {key: value}) for value in values)
    return _checked(Grid(key, rows), f"--grid {text}")


def read_grid(path: Path) -> Grid:
    """The grid in a file; RecipeError as `grid_of`."""
    try:
        grid = TypeAdapter(Grid).validate_python(yaml.safe_load(path.read_text()))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"grid {path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeError(
            f"{path}: {where or 'it'}: {first['msg']}; a grid has title, rows (name, set) and then"
        ) from None
    if not grid.rows:
        raise RecipeError(f"{path} has no rows")
    return _checked(grid, str(path))


def cells_of(recipe: Recipe, grids: Sequence[Grid], seeds: Sequence[int]) -> list[Cell]:
    """Every combination of the grids' rows, by seeds, in order.

    Raises:
        RecipeError: an unknown key (the nearest is named), a value that makes no recipe, the same cell twice.
    """
    if not seeds:
        raise RecipeError("--seeds names none; write --seeds 0,1,2")
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
        paper = _paper(rows[0]) if len(rows) == 1 else {}
        cells.append(Cell(name, setting, seed, resolve(nested, f"cell {name}"), paper))
    for place, cell in enumerate(cells):
        for other in cells[:place]:
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
    raise RecipeError(f"--grid {text} is no key=a,b,c, no file, and no grid of {GRIDS.parent.name}/{GRIDS.name}{hint}")


def _checked(grid: Grid, where: str) -> Grid:
    if twice := [name for name, count in Counter(row.name for row in grid.rows).items() if count > 1]:
        raise RecipeError(f"{where} has {twice[0]} twice; leave one out")
    return grid


def _shown(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _paper(row: Row) -> dict[str, float]:
    known = {"finetune": row.finetune, "linprobe": row.linprobe}
    return {job: value for job, value in known.items() if value is not None}
