"""`maelstream pretrain RECIPE --run DIR`: trains a masked autoencoder, or goes on with the run that lies in DIR.

Alone it is one rank; under `maelstream launch`, `deepspeed --module maelstream.jobs.pretrain`, `torchrun --module` or `srun` it is
one of many. The run starts from its newest good checkpoint, if it has one, and then takes the same steps as if it had
never stopped.
"""

import maelstream.jobs.distributed.parent_death  # noqa: F401  before anything slow is imported

# isort: split
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import Tensor

from maelstream.jobs.arguments import parsed
from maelstream.jobs.checkpointing.partition import Partition
from maelstream.jobs.command import run
from maelstream.jobs.distributed.ranks import ControlGroup, ranks_from_environment
from maelstream.jobs.recipe import Recipe, RecipeError, dump_recipe, load_recipe
from maelstream.jobs.reporting.checkpoint_reconstructions import CheckpointReconstructor
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.training.data import loader_of, open_data
from maelstream.jobs.training.engine import build_engine, build_model
from maelstream.jobs.training.trainer import Loss, train
from maelstream.jobs.weights.target_file import target_of_run
from maelstream.model.mae import MAE
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.loader import Batch, ImageLoader
from maelstream.pipeline.sample_source import BadSample


@dataclass(frozen=True)
class Pretrain:
    """Train a masked autoencoder from a recipe, or go on with the run that lies in --run."""

    recipe_file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE")]
    """A YAML file of recipes/, or your own with one of them as its `base:`."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    run: Path = Path("runs/pretrain")
    """The run's folder; a run that lies there already goes on from its newest checkpoint."""
    stop_at_step: int | None = None
    """Save and stop after this step, instead of at the end of the schedule."""
    allow: tuple[str, ...] = ()
    """Keys of the experiment that may be others than those the run was started with: --allow optim.epochs."""
    print_config: bool = False
    """Print the resolved recipe and stop."""


class Pretraining:
    """The task: what `maelstream.jobs.training.trainer` asks of it."""

    command, ema = "pretrain", 0.0

    def __init__(self, recipe: Recipe, folder: RunFolder):
        self.recipe = recipe
        self._dataset, self._order = open_data(recipe.data, recipe.seed)
        self.samples, self.fingerprint = len(self._dataset), self._dataset.fingerprint
        self._target_file = target_of_run(recipe, folder)
        self._reconstructor = CheckpointReconstructor(recipe, folder, self.samples)

    def loader(
        self, batch_split: BatchSplit, rank: int, threads: int, on_bad: Callable[[BadSample], None]
    ) -> ImageLoader:
        return loader_of(self.recipe, self._dataset, self._order, batch_split, rank, threads, on_bad)

    def build(self, trained: dict[str, Tensor] | None) -> MAE:
        target = None if self._target_file is None else self._target_file.target(self.recipe.model)
        model = build_model(self.recipe, target)
        if trained is not None:
            model.load_state_dict(trained, strict=False)  # buffers are no weights
        return model

    def engine(self, model: Any, batch_split: BatchSplit) -> Any:
        return build_engine(self.recipe, batch_split, model)

    def joined(
        self, engine: Any, partition: Partition, control_group: ControlGroup, heartbeat: Callable[[], None]
    ) -> None:
        pass

    def fixed(self) -> dict[str, Tensor]:
        return {}

    def loss(self, step: int) -> Loss:
        return reconstruction_loss

    def keep(self, folder: RunFolder) -> None:
        if self._target_file is not None and self._target_file.path != folder.target_file:
            self._target_file.write(folder.target_file)

    def due(self, step: int, total: int) -> bool:
        return False

    def measure(self, step: int) -> dict[str, float]:
        return {}

    def published(self, step: int, total: int) -> None:
        self._reconstructor(step, total)

    def finished(self, folder: RunFolder) -> bool:
        return True

    def finish(self, folder: RunFolder, step: int) -> None:
        pass


def reconstruction_loss(engine: Any, images: Tensor, batch: Batch, number: int) -> Tensor:
    """Of the removed patches of a micro-batch."""
    return engine(images, batch.keys.to(engine.device, non_blocking=True))


def main(args: list[str]) -> int:
    """`maelstream pretrain`; 0 when the run reached its end or --stop-at-step."""
    default: Any = tyro.MISSING  # for --help
    if args and not args[0].startswith("-"):
        default = Pretrain(Path(args[0]), load_recipe(Path(args[0])), Path("runs") / Path(args[0]).stem)
    elif not {"-h", "--help"} & set(args):
        raise RecipeError("RECIPE comes first: `maelstream pretrain recipes/pretrain_vit_b16.yaml --run DIR ...`")
    command = parsed(Pretrain, args, "pretrain", default)
    if command.print_config:
        print(dump_recipe(command.recipe), end="")
        return 0
    folder = RunFolder(command.run)
    folder.check_same_experiment(command.recipe, command.allow)
    return train(Pretraining(command.recipe, folder), folder, command.stop_at_step, ranks_from_environment())


if __name__ == "__main__":
    sys.exit(run("pretrain", sys.argv[1:]))
