"""Evidence: its commands make recipes, and its page tells means, differences by seed, and what is open."""

from pathlib import Path

import pytest

from benchmarks.evidence import SEEDS, Evidence, Options, page, spread
from jobs.evaluations import Evaluation, Job, record
from jobs.grid import cells_of, grid_of
from jobs.recipe import load_any_recipe, load_recipe
from jobs.sweep import Sweep, steps_of


def options(tmp_path: Path, size: str = "reduced") -> Options:
    return Options(Path("cifar10.tar.gz"), size, tmp_path)  # type: ignore[arg-type]


def evaluated(folder: Path, job: Job, top1: float, blocks: float = -1) -> None:
    """A result as an evaluation of a run leaves it."""
    weights = folder.parent if job != "scratch" else None
    found = Evaluation(
        job,
        folder.name,
        top1,
        99.0,
        10_000,
        4.0,
        782,
        str(weights or ""),
        "a",
        "b",
        str(folder),
        {"blocks": blocks},
        0.0,
    )
    record(found, weights)


@pytest.mark.parametrize("size", ["reduced", "whole"])
def test_every_command_is_made_of_recipes_that_can_be_read(size: str, tmp_path: Path) -> None:
    sweeps = 0
    for command in Evidence(options(tmp_path, size)).commands():
        for word in command:
            for name in (part for part in word.split() if part.startswith(f"recipes/evidence/{size}/")):
                load_any_recipe(Path(name))
        if command[0] == "sweep":
            grids = [grid_of(command[place + 1]) for place, word in enumerate(command) if word == "--grid"]
            then = [command[place + 1] for place, word in enumerate(command) if word == "--then"]
            assert cells_of(load_recipe(Path(command[1])), grids, SEEDS) and steps_of(then)
            sweeps += 1
    assert sweeps == 6 and Sweep.__dataclass_fields__.keys() >= {"grid", "seeds", "then", "train", "val"}


def test_every_row_is_a_cell_of_a_sweep_or_a_supervised_run(tmp_path: Path) -> None:
    evidence = Evidence(options(tmp_path))
    folders = {f"scratch-x{times}/seed-{seed}" for times in (1, 2) for seed in SEEDS}
    for command in evidence.commands():
        if command[0] == "sweep":
            grids = [grid_of(command[place + 1]) for place, word in enumerate(command) if word == "--grid"]
            cells = cells_of(load_recipe(Path(command[1])), grids, SEEDS)
            folders |= {f"{Path(command[3]).name}/{cell.folder}" for cell in cells}
    assert {f"{setting.runs}{seed}" for setting in evidence.settings() for seed in SEEDS} == folders


def test_claims_are_of_rows_that_there_are(tmp_path: Path) -> None:
    for size in ("reduced", "whole"):
        evidence = Evidence(options(tmp_path, size))
        rows = {setting.name for setting in evidence.settings()}
        assert {row for claim in evidence.claims() for row, _ in (claim.better, claim.worse)} <= rows


def test_the_page_tells_means_differences_and_what_is_open(tmp_path: Path) -> None:
    evidence = Evidence(options(tmp_path))
    for seed, (tuned, supervised) in enumerate([(60, 50), (62, 51), (58, 59)]):
        evaluated(evidence.runs / f"base/the-recipe_seed-{seed}" / "finetune", "finetune", tuned)
        evaluated(evidence.runs / f"scratch-x1/seed-{seed}", "scratch", supervised)
    evaluated(evidence.runs / "base/the-recipe_seed-0" / "partial", "partial", 40, 1)
    told = page(evidence, "reduced")
    assert "| random 75 % (the recipe) | 60.00 ± 2.00 | 40.00 (1 of 3) |" in told
    assert "| 1. pre-trained and fine-tuned over supervised | 6.67 ± 6.66 | 2 of 3 |" in told
    assert "| 1. and over supervised for twice the epochs | open |  |" in told
    assert spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"


def test_a_supervised_run_that_ended_is_not_started_again(tmp_path: Path) -> None:
    evidence = Evidence(options(tmp_path))
    before = sum(command[0] == "launch" for command in evidence.commands())
    evaluated(evidence.runs / "scratch-x1/seed-1", "scratch", 50.0)
    assert sum(command[0] == "launch" for command in evidence.commands()) == before - 1
