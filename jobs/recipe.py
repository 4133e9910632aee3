"""Recipes: one YAML file per experiment, laid over its `base:` and resolved into frozen dataclasses.

The keys `engine`, `loader`, `log`, `checkpoint` and `health` define how a run is executed and may change between
starts. All other keys define the experiment and stay the same for the life of a run. The dataclasses are in
`jobs/recipe_schema.py`.
"""

import difflib
import os
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from maelstream.jobs.recipe_schema import (
    AnyRecipe,
    CheckpointConfig,
    ClassificationRecipe,
    DataConfig,
    EngineConfig,
    HealthConfig,
    Job,
    LabelledData,
    LogConfig,
    OptimConfig,
    Recipe,
    StreamConfig,
    TuningConfig,
)
from maelstream.jobs.yaml_files import YamlError, read_yaml
from maelstream.pipeline.config import MARGIN, LoaderConfig, evaluation_margin
from maelstream.shards.errors import MaelstreamError

# fmt: off
__all__ = [
    "EXPERIMENT", "RECIPES", "AnyRecipe", "CheckpointConfig", "ClassificationRecipe", "DataConfig", "EngineConfig",
    "HealthConfig", "Job", "LabelledData", "LoaderConfig", "LogConfig", "OptimConfig", "Recipe", "RecipeError",
    "StreamConfig", "TuningConfig", "check_kind", "differing_keys", "dump_recipe", "first_error", "flat_values",
    "load_any_recipe", "load_recipe", "may_change", "merged_values", "named_recipes", "nested_values", "read_values",
    "recipe_file", "resolve", "resolve_as",
]
# fmt: on

RECIPES = Path(__file__).parents[1] / "recipes"
"""The recipes that ship with the project, in a checkout and in a wheel."""
EXPERIMENT = ("model", "data", "optim", "seed")
_NO_EXPERIMENT = ("target_file", "weights_step", "engine", "loader", "log", "checkpoint", "health")
R = TypeVar("R", Recipe, ClassificationRecipe)


class RecipeError(MaelstreamError):
    """A recipe cannot be read, or its values are wrong."""


def named_recipes() -> dict[str, Path]:
    """The recipes and grids that ship with the project by name: pretrain_vit_b16 is recipes/pretrain/vit_b16.yaml."""
    return {f"{path.parent.name}_{path.stem}": path for path in sorted(RECIPES.glob("*/*.yaml"))}


def recipe_file(path: Path) -> Path:
    """The file of a recipe that a user gave by its path or by its name."""
    return named_recipes().get(str(path), path)


def load_recipe(path: Path) -> Recipe:
    """The pre-training recipe in the file `path`, or of the name `path`.

    Raises:
        RecipeError: a missing file, a base that leads back to itself, an unknown key or a wrong value.
    """
    values = read_values(path)
    check_kind(values, Recipe, str(path))
    return resolve(values, str(path))


def load_any_recipe(path: Path) -> AnyRecipe:
    """The recipe in the file `path`, of either kind: a file with the key `job` is a `ClassificationRecipe`.

    Raises:
        RecipeError: as `load_recipe`.
    """
    values = read_values(path)
    if "job" in values:
        return resolve_as(ClassificationRecipe, values, str(path))
    return resolve_as(Recipe, values, str(path))


def resolve(values: dict[str, Any], where: str) -> Recipe:
    """A pre-training recipe from nested plain values; errors begin with `where`."""
    return resolve_as(Recipe, values, where)


def resolve_as(schema: type[R], values: dict[str, Any], where: str) -> R:
    """A recipe of the class `schema` from nested plain values; errors begin with `where`.

    Raises:
        RecipeError: an unknown key or a wrong value.
    """
    _check_keys(values, schema, where, "")
    try:
        return TypeAdapter(schema).validate_python(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {first_error(error)}") from None


def first_error(error: ValidationError) -> str:
    """The first error of a validation: the key, what is wrong, and the value if the message lacks it."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":  # by a `__post_init__`, whose message names the value
        return f"{name}: {first['ctx']['error']}"
    if first["type"] == "missing":  # whose input is all that surrounds the key
        return f"{name}: {first['msg']}"
    found = repr(first["input"])
    return f"{name}: {first['msg']} (found {found if len(found) <= 60 else found[:57] + '...'})"


def check_kind(values: dict[str, Any], schema: type[AnyRecipe], where: str) -> None:
    """Raises RecipeError if values, as they stand in a file, are a grid or a recipe of another kind than `schema`."""
    if isinstance(values.get("rows"), list):
        raise RecipeError(
            f"{where} is a grid, not a recipe; use it with `maelstream pretrain {where} --row NAME`, or with --grid of "
            "`maelstream sweep`"
        )
    if schema is Recipe and isinstance(job := values.get("job"), str) and job in get_args(Job):
        names = "TRAIN VAL" if job == "scratch" else "WEIGHTS TRAIN VAL"
        raise RecipeError(f"{where} is a recipe of {job}; use it with `maelstream {job} {names} --recipe {where}`")
    if schema is ClassificationRecipe and "job" not in values:
        try:
            _check_keys(values, ClassificationRecipe, where, "")
        except RecipeError as unknown:
            try:
                _check_keys(values, Recipe, where, "")
            except RecipeError:
                raise unknown from None
            raise RecipeError(
                f"{where} is a recipe of pretrain; use it with `maelstream pretrain {where}`; the recipes of this "
                f"kind are {', '.join(name for name in named_recipes() if name.startswith(get_args(Job)))}"
            ) from None


def read_values(path: Path) -> dict[str, Any]:
    """The nested values of a file or a name, laid over those of its bases; keys and values are not checked.

    Raises:
        RecipeError: a missing file, a file that is not YAML, or a base that leads back to itself.
    """
    return _read(recipe_file(path), ())


def dump_recipe(recipe: AnyRecipe) -> str:
    """YAML with every key; `load_any_recipe` returns the same recipe from it."""
    return yaml.safe_dump(_with_lists(asdict(recipe)), sort_keys=False)


def differing_keys(old: AnyRecipe, new: AnyRecipe) -> dict[str, tuple[Any, Any]]:
    """The dotted keys of the experiment in which two recipes differ, each with the old and the new value."""
    old_values, new_values = (
        flat_values({name: value for name, value in asdict(recipe).items() if name not in _NO_EXPERIMENT})
        | {"data.crop.margin": recipe.data.crop.margin or _margin(recipe)}
        for recipe in (old, new)
    )
    names = [*new_values, *(name for name in old_values if name not in new_values)]
    pairs = {name: (old_values.get(name), new_values.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _margin(recipe: AnyRecipe) -> float:
    """The margin of a recipe without one; up to version 0.1, every recipe had one."""
    return MARGIN if isinstance(recipe, Recipe) else evaluation_margin(recipe.model.image_size)


def may_change(name: str) -> bool:
    """Whether a run can resume with another value of this dotted key, if its user allows it.

    The schedule and the dataset's location can change, because a checkpoint contains the dataset's fingerprint. The
    shape of the weights, the order of samples and the batch size cannot.
    """
    paths = ("data.dataset", "data.train", "data.val", "weights")
    return name in (*paths, "tuning.evaluate_every_epochs") or (
        name.startswith("optim.") and name != "optim.batch_size"
    )


def merged_values(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Nested `values` laid over `base`: a key of `values` replaces the same key of `base`, at every level."""
    both_dicts = {k for k in values.keys() & base.keys() if isinstance(values[k], dict) and isinstance(base[k], dict)}
    return base | values | {key: merged_values(base[key], values[key]) for key in both_dicts}


def flat_values(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as one dict with dotted keys: {"a": {"b": 1}} becomes {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flat_values(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def nested_values(flat: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted key as nested dicts: {"a.b": 1} becomes {"a": {"b": 1}}."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, name = key.split(".")
        parent = nested
        for part in path:
            parent = parent.setdefault(part, {})
        parent[name] = value
    return nested


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The file's values laid over those of its base; `above` are the files that lead to this one."""
    if path.resolve() in above:
        raise RecipeError(f"{path}: its chain of `base:` leads back to itself")
    try:
        values = read_yaml(path)
    except YamlError as error:
        hint = "" if path.exists() else _nearest(path)
        raise RecipeError(f"recipe {path} cannot be read ({error}){hint}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    values = _with_home(values)
    if (base := values.pop("base", None)) is None:
        return values
    if not isinstance(base, str):
        raise RecipeError(f"{path}: base must be the path of a recipe, not {str(base)[:40]}")
    base_file = named_recipes().get(base, path.parent / base)
    return merged_values(_read(base_file, (*above, path.resolve())), values)


def _nearest(path: Path) -> str:
    """A hint at the recipe that was probably meant by `path`, which does not exist; empty without one."""
    name = f"{path.parent.name}_{path.stem}"
    if not path.suffix:
        near = difflib.get_close_matches(str(path), named_recipes(), 1)
        return f"; did you mean {near[0]}?" if near else f"; the named recipes are {', '.join(named_recipes())}"
    if name in named_recipes():
        return f"; the recipe that ships with maelstream is named {name}"
    near = difflib.get_close_matches(path.stem, sorted(p.stem for p in path.parent.glob("*.yaml")), 1)
    return f"; did you mean {path.with_name(near[0] + '.yaml')}?" if near else ""


def _check_keys(values: dict[str, Any], schema: type, where: str, prefix: str) -> None:
    hints = get_type_hints(schema)
    names = [item.name for item in fields(schema)]
    for key, value in values.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1, cutoff=0.0)[0]
            raise RecipeError(f"{where}: unknown key {prefix}{key}; the nearest is {prefix}{near}")
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise RecipeError(f"{where}: {prefix}{key} must hold keys, not the value {value!r}")
            _check_keys(value, hints[key], where, f"{prefix}{key}.")


def _with_home(value: Any) -> Any:
    """The value with the home folder in place of `~` at the start of its texts."""
    if isinstance(value, dict):
        return {_with_home(key): _with_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return list(map(_with_home, value))
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _with_lists(value: Any) -> Any:
    """The value with lists in place of tuples, because YAML writes tuples with a Python tag."""
    if isinstance(value, dict):
        return {key: _with_lists(item) for key, item in value.items()}
    return [_with_lists(item) for item in value] if isinstance(value, tuple) else value
