"""`maelstream pretrain RECIPE --run DIR`: trains a masked autoencoder, or resumes the run in DIR.

Started alone, it is one rank. Under `maelstream launch`, `deepspeed --module maelstream.jobs.pretrain`,
`torchrun --module` or `srun` it is one of many. The run resumes from its newest good checkpoint and then takes the same
steps as if it had never stopped. torch, DALI and DeepSpeed take seconds to import, so options and recipe are checked
first.
"""

import maelstream.jobs.distributed.parent_death  # noqa: F401  before anything slow is imported

# isort: split
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from maelstream.jobs.arguments import asks_for_help, option_value, parse_arguments
from maelstream.jobs.command import run
from maelstream.jobs.recipe import Recipe, RecipeError, dump_recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.sweeps.grid import load_recipe_or_row, slug
from maelstream.jobs.training.run_options import RunOptions


@dataclass(frozen=True)
class Pretrain(RunOptions):
    """Train a masked autoencoder from a recipe, or resume the run in --run."""

    recipe_file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE")]
    """A recipe's name, such as pretrain_vit_b16, or a YAML file, of which such a name can be the `base:`; a grid of
    recipes needs --row."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    row: str | None = None
    """The row of a grid to run, by its name or its value: recipes/grids/decoder_depth.yaml --row 4."""


def main(args: list[str]) -> int:
    """Runs `maelstream pretrain`; 0 when the run reached its end or --stop-at-step."""
    default: Any = Pretrain(tyro.MISSING, Recipe(), run=Path("runs/RECIPE"))  # for --help without a recipe
    if args and not args[0].startswith("-"):
        file, row = Path(args[0]), option_value(args, "--row")
        name = file.stem if row is None else f"{file.stem}-{slug(row)}"
        default = Pretrain(tyro.MISSING, load_recipe_or_row(file, row), row=row, run=Path("runs") / name)
    elif not asks_for_help(args):
        raise RecipeError("RECIPE comes first: `maelstream pretrain pretrain_vit_b16 --run DIR ...`")
    command = parse_arguments(Pretrain, args, "pretrain", default)
    recipe = command.recipe
    if command.print_config:
        print(dump_recipe(recipe), end="")
        return 0
    from maelstream.jobs.distributed.ranks import ranks_from_environment
    from maelstream.jobs.reporting.checkpoint_reconstructions import CheckpointReconstructor
    from maelstream.jobs.training.pretraining import Pretraining
    from maelstream.jobs.training.trainer import train
    from maelstream.jobs.weights.initial import initial_weights
    from maelstream.jobs.weights.target_file import run_target_file

    folder = RunFolder(command.run)
    recipe, initial = initial_weights(recipe, folder)
    folder.check_same_experiment(recipe, command.allow)
    target_file = run_target_file(recipe, folder)
    target = None if target_file is None else target_file.target(recipe.model)
    objective = Pretraining(recipe, target, None if initial is None else initial.tensors)

    def keep_files() -> None:
        if target_file is not None and target_file.path != folder.target_file:
            target_file.write(folder.target_file)
        if initial is not None:
            initial.write(folder.initial_weights)

    reconstruct = CheckpointReconstructor(recipe, folder, objective.dataset_size)
    ranks = ranks_from_environment()
    return train(objective, folder, command.stop_at_step, ranks, keep_files, reconstruct)


if __name__ == "__main__":
    sys.exit(run("pretrain", sys.argv[1:]))
