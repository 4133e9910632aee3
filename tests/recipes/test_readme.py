"""Every command of recipes/README.md resolves to a recipe, and its numbers are those of the paper."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from maelstream.jobs.arguments import option_value, parse_arguments
from maelstream.jobs.command import run
from maelstream.jobs.evaluation.classify import default_recipe
from maelstream.jobs.profiling.table2_times import PAPER_HOURS
from maelstream.jobs.recipe import (
    ClassificationRecipe,
    Job,
    Recipe,
    differing_keys,
    load_any_recipe,
    load_recipe,
    resolve,
)
from maelstream.jobs.sweep import Sweep
from maelstream.jobs.sweeps.grid import GRIDS, cells_of, grid_of, read_grid, recipe_of_row, slug
from maelstream.jobs.sweeps.sweeping import steps_of
from maelstream.jobs.table2 import Table2
from maelstream.model.sizes import PAPER_SIZES

ROOT = Path(__file__).parents[2]
README = (ROOT / "recipes" / "README.md").read_text()
COMMANDS = re.findall(r"(?:`|^ {4})maelstream ([a-z0-9]+ [^`\n]+)", README, re.MULTILINE)
LABELLED = ("finetune", "linprobe", "partial", "scratch")
TABLE_6 = {
    "inat2017": (70.5, 75.7, 79.3, 83.4),
    "inat2018": (75.4, 80.1, 83.0, 86.8),
    "inat2019": (80.5, 83.4, 85.7, 88.3),
    "places205": (63.9, 65.8, 65.9, 66.8),
    "places365": (57.9, 59.4, 59.8, 60.3),
}
IMAGENET = {
    "finetune": {"vit_b16": 83.6, "vit_l16": 85.9, "vit_h14": 86.9, "vit_h14_448": 87.8},
    "linprobe": {"vit_b16": 68.0, "vit_l16": 75.8, "vit_h14": 76.6},
    "scratch": {"vit_b16": 82.3, "vit_l16": 82.6, "vit_h14": 83.1},
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def commands(*jobs: str) -> list[str]:
    return [command for command in COMMANDS if command.split()[0] in jobs]


@pytest.mark.parametrize("command", commands("pretrain"))
def test_a_command_for_pre_training_prints_its_recipe(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    job, *args = shlex.split(command)
    assert run(job, [*args, "--print-config"]) == 0
    recipe = resolve(yaml.safe_load(capsys.readouterr().out), command)
    row = option_value(args, "--row")
    assert recipe == (load_recipe(Path(args[0])) if row is None else recipe_of_row(Path(args[0]), row))


@pytest.mark.parametrize("command", commands(*LABELLED))
def test_a_command_with_labels_names_a_recipe_of_its_job(command: str) -> None:
    job, *args = shlex.split(command)
    recipe = load_any_recipe(Path(option_value(args, "--recipe") or ""))
    assert isinstance(recipe, ClassificationRecipe)
    assert recipe.job == ("finetune" if job == "partial" else job)
    assert float(option_value(args, "--blocks") or 0) <= recipe.model.depth


@pytest.mark.parametrize("job", LABELLED)
def test_every_encoder_of_the_paper_and_any_other_has_a_default_recipe(job: Job) -> None:
    for encoder in (*PAPER_SIZES, None):
        recipe = load_any_recipe(default_recipe(job, encoder))
        assert isinstance(recipe, ClassificationRecipe) and recipe.job == ("finetune" if job == "partial" else job)


@pytest.mark.parametrize("command", commands("sweep"))
def test_a_sweep_has_more_than_one_cell_or_evaluation(command: str) -> None:
    options = parse_arguments(Sweep, shlex.split(command)[1:], "sweep")
    grids = [grid_of(text) for text in options.grid]
    steps = steps_of([*options.then, *(text for grid in grids for text in grid.then)])
    assert len(cells_of(load_recipe(options.recipe), grids, [0])) * len(steps) > 1
    assert all((GRIDS / grid.base).resolve() == options.recipe.resolve() for grid in grids)


@pytest.mark.parametrize("command", commands("table2"))
def test_the_hours_of_table_2_are_the_papers(command: str) -> None:
    (size,) = parse_arguments(Table2, shlex.split(command)[1:], "table2").size
    assert f"| `maelstream {command}` | {', '.join(map(str, PAPER_HOURS[size]))} |" in README


def test_every_command_is_tested_and_no_two_share_a_run() -> None:
    assert len(COMMANDS) == len(set(COMMANDS)) == len(commands("pretrain", *LABELLED, "sweep", "table2")) > 90
    runs = [shlex.split(command)[-1] for command in COMMANDS if "--run" in command]
    assert len(runs) == len(set(runs)) == 39


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_row_of_a_grid_is_a_recipe_and_has_a_command_with_the_papers_numbers(path: Path) -> None:
    grid = read_grid(path)
    base = load_recipe(GRIDS / grid.base)
    for row, cell in zip(grid.rows, cells_of(base, [grid], [base.seed]), strict=True):
        assert recipe_of_row(path, row.name) == recipe_of_row(path, slug(row.name)) == cell.recipe
        numbers = f" {row.finetune} | {row.linprobe} |" if row.finetune else ""
        line = f"`maelstream pretrain recipes/grids/{path.name} --row {slug(row.name)}` |{numbers}\n"
        assert line in README or path.stem == "partial_blocks"


def test_figure_9_has_a_command_per_number_of_blocks() -> None:
    blocks = [option_value(shlex.split(command), "--blocks") for command in commands("partial")]
    assert [f"partial --blocks {number}" for number in blocks] == list(read_grid(GRIDS / "partial_blocks.yaml").then)


@pytest.mark.parametrize("job", IMAGENET)
def test_training_with_labels_has_a_command_per_model_with_the_papers_number(job: str) -> None:
    for model, number in IMAGENET[job].items():
        recipe = f"recipes/{job}/{model}.yaml"
        assert f"--recipe {recipe} --run runs/{job}-{model}` | {number} |" in README
        assert f" {number} top-1" in (ROOT / recipe).read_text()


@pytest.mark.parametrize("data", TABLE_6)
def test_table_6_has_a_command_per_model_with_the_papers_number(data: str) -> None:
    for model, number in zip(("vit_b16", "vit_l16", "vit_h14", "vit_h14_448"), TABLE_6[data], strict=True):
        weights = f"runs/{model.removesuffix('_448')}_1600"
        command = f"finetune {weights} data/{data}-train data/{data}-val --recipe recipes/finetune/{model}.yaml"
        assert f"| `maelstream {command} --run runs/{data}-{model}` | {number} |" in README


def test_figure_7_changes_the_epochs_alone() -> None:
    base = load_recipe(ROOT / "recipes/pretrain/vit_l16_pixels.yaml")
    for epochs in (100, 200, 400, 1600):
        recipe: Recipe = recipe_of_row(GRIDS / "epochs.yaml", str(epochs))
        assert differing_keys(base, recipe) == {"optim.epochs": (800.0, float(epochs))}
