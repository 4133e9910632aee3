"""`maelstream profile RECIPE`: measures each stage alone, then the run end to end, and reports the bottleneck.

Without a launcher there is one rank. Under `maelstream launch --nproc N profile RECIPE` all ranks measure at the same
time, and rates are those of all ranks together. Nothing is trained: weights and moments are discarded.
"""

import maelstream.jobs.distributed.parent_death  # noqa: F401  before anything slow is imported

# isort: split
import difflib
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from maelstream.jobs.arguments import asks_for_help, check_output_file, check_picture_file, parse_arguments
from maelstream.jobs.command import run
from maelstream.jobs.profiling.stage_table import stage_table, summary
from maelstream.jobs.recipe import Recipe, RecipeError, load_recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.pipeline.config import STAGES
from maelstream.shards.errors import MaelstreamError


@dataclass(frozen=True)
class Profile:
    """Measure each stage of a run alone, then the run end to end, and report which stage limits it."""

    recipe_file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE")]
    """The name or the YAML file of a pre-training recipe; every key of it is an option."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    stages: str = ",".join(STAGES)
    """The stages to measure. With `step`, the run is also measured end to end."""
    seconds: float = 5.0
    """Seconds to measure each stage, and the run end to end; at least a few batches."""
    out: Path = Path("profile.png")
    """The chart to write."""
    json: Path | None = None
    """Write all figures to this JSON file."""
    trace: Path | None = None
    """Write a trace of three steps, for https://ui.perfetto.dev; `.json` or `.json.gz`."""


def stages_of(text: str) -> list[str]:
    """The stages that `--stages` names. Raises RecipeError for an unknown name."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in STAGES:
            near = difflib.get_close_matches(name, STAGES, 1, cutoff=0.0)[0]
            raise RecipeError(f"--stages: there is no {name!r}; the nearest is {near!r} of {', '.join(STAGES)}")
    if not names:
        raise RecipeError(f"--stages names none of {', '.join(STAGES)}")
    return names


def main(args: list[str]) -> int:
    """`maelstream profile`."""
    default: Any = Profile(tyro.MISSING, Recipe())  # for --help without a recipe
    if args and not args[0].startswith("-"):
        default = Profile(tyro.MISSING, load_recipe(Path(args[0])))
    elif not asks_for_help(args):
        raise RecipeError("RECIPE comes first: `maelstream profile pretrain_vit_b16 ...`")
    command = parse_arguments(Profile, args, "profile", default)
    names, recipe = stages_of(command.stages), command.recipe
    if command.seconds <= 0:
        raise RecipeError(f"--seconds {command.seconds} must be more than 0")
    if command.trace is not None and "step" not in names:
        raise RecipeError("--trace records whole steps; add step to --stages")
    check_picture_file("--out", command.out)
    for option, file in (("--json", command.json), ("--trace", command.trace)):
        if file is not None:
            check_output_file(option, file)
    # torch, DALI and DeepSpeed take seconds to import; options and recipe are checked before.
    from maelstream.jobs.distributed.ranks import process_group, ranks_from_environment
    from maelstream.jobs.profiling.stage_chart import draw_stage_chart
    from maelstream.jobs.profiling.stage_profiler import data_path_of, profile_recipe
    from maelstream.jobs.weights.target_file import run_target_file

    with tempfile.TemporaryDirectory() as empty:
        target_file = run_target_file(recipe, RunFolder(Path(empty)))
    target = None if target_file is None else target_file.target(recipe.model)
    ranks = ranks_from_environment()
    data_path_of(recipe, ranks)  # reports errors in the data before the ranks connect
    with process_group(ranks, recipe.health.silent_s) as control_group:
        figures = profile_recipe(recipe, target, names, command.seconds, control_group, command.trace)
    if ranks.rank > 0:
        return 0
    figures["recipe"] = command.recipe_file.stem
    console = Console(markup=False, emoji=False)
    console.print(stage_table(figures))
    for line in summary(figures):
        console.print(line)
    draw_stage_chart(figures, command.out)
    if command.json is not None:
        try:
            command.json.write_text(json.dumps(figures, indent=1) + "\n")
        except OSError as error:
            raise MaelstreamError(f"--json {command.json} cannot be written ({error.strerror})") from None
    console.print(f"chart: {command.out}" + (f"; trace: {command.trace}" if command.trace is not None else ""))
    return 0


if __name__ == "__main__":
    sys.exit(run("profile", sys.argv[1:]))
