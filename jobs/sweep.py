"""`maelstream sweep RECIPE --grid key=a,b,c --dir DIR`: a table of runs, each evaluated, as the paper's Table 1.

The same command again skips the runs and evaluations that are finished and resumes the others from their checkpoints.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from maelstream.jobs.arguments import check_output_folder, parse_arguments
from maelstream.jobs.distributed.launching import gpu_count
from maelstream.jobs.recipe import RecipeError, load_recipe
from maelstream.jobs.sweeps.grid import cells_of, grid_of
from maelstream.jobs.sweeps.sweeping import SweepFolder, launched, outcomes, run_cells, seeds_of, steps_of
from maelstream.jobs.sweeps.table import draw, table, write_results
from maelstream.shards.errors import MaelstreamError


@dataclass(frozen=True)
class Sweep:
    """Train and evaluate every combination of the grids' values and the seeds."""

    recipe: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE")]
    """The recipe that every run changes."""
    dir: Path
    """The folder of the runs. A sweep that is already there resumes."""
    grid: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=A,B,C|NAME")] = ()
    """Values of a key, a file, or one of recipes/grids (decoder_depth, mask_ratio, ...); several multiply."""
    seeds: str = ""
    """Such as 0,1,2; the recipe's own if not given."""
    then: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="JOB")] = ()
    """finetune, linprobe, partial or knn, with its options in the same quotes: --then "partial --blocks 4"."""
    train: str = ""
    """Packed dataset with labels for the evaluations; the recipe's own if not given."""
    val: str = ""
    """Packed dataset that the evaluations are scored on."""
    nproc: int | None = None
    """Ranks of each run; one per GPU if not given, or one without GPUs."""
    max_restarts: int = 0
    """How often a run is started again after a failure."""


def main(args: list[str]) -> int:
    """Runs `maelstream sweep`; returns 0 when every cell is finished, otherwise the exit code of the failed command."""
    command = parse_arguments(Sweep, args, "sweep")
    recipe, grids = load_recipe(command.recipe), [grid_of(text) for text in command.grid]
    steps = steps_of([*command.then, *(text for grid in grids for text in grid.then)])
    cells = cells_of(recipe, grids, seeds_of(command.seeds, recipe.seed))
    if not grids and not command.seeds:
        raise RecipeError("a sweep needs --grid key=a,b,c, or --seeds 0,1,2; `maelstream pretrain` runs one recipe")
    if steps and not command.val:
        raise RecipeError(f"--then {steps[0].name} needs --val: a packed dataset to score it on")
    if (command.nproc is not None and command.nproc < 1) or command.max_restarts < 0:
        raise RecipeError("--nproc starts at 1 and --max-restarts at 0")
    check_output_folder("--dir", command.dir)
    folder = SweepFolder(command.dir, command.train, command.val)
    console = Console(width=max(Console().width, 120), markup=False, emoji=False)
    start = launched(command.nproc or max(1, gpu_count()), command.max_restarts)
    code = run_cells(folder, cells, steps, start, console)
    found = outcomes(folder, cells, steps)
    title = "; ".join(grid.title for grid in grids) or str(command.recipe)
    names = [step.name for step in steps]
    try:
        command.dir.mkdir(parents=True, exist_ok=True)
        write_results(found, names, command.dir)
    except OSError as error:
        raise MaelstreamError(f"{command.dir} cannot be written ({error.strerror})") from None
    console.print(table(found, names, title))
    written = ["results.json", "results.csv"]
    if any(result is not None for outcome in found for result in outcome.results.values()):
        draw(found, names, title, command.dir / "sweep.png")
        written.append("sweep.png")
    console.print(f"{command.dir}: {', '.join(written)}")
    return code
