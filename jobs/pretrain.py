"""`maelstream pretrain RECIPE --run DIR`: trains a masked autoencoder, or goes on with the run that lies in DIR.

Alone it is one rank; under `deepspeed --no_local_rank --module jobs.pretrain RECIPE --run DIR` or `torchrun --module`
it is one of many. The run starts from its newest checkpoint, if it has one, and then takes the same steps as if it had
never stopped.
"""

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from jobs.command import run
from jobs.data import open_data
from jobs.engine import (
    Ranks,
    build_engine,
    mean_over_ranks,
    merged_weights,
    process_group,
    ranks_from_environment,
    set_lr,
)
from jobs.log import Clock, run_log
from jobs.recipe import Recipe, RecipeError, dump_recipe, load_recipe
from jobs.runfolder import RunFolder
from jobs.targetfile import target_of_run
from model.optimise import lr_at
from pipeline.draws import AugmentDraws
from pipeline.line import Slices
from pipeline.loader import Batch, PretrainLoader


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
    print_config: bool = False
    """Print the resolved recipe and stop."""


@dataclass(frozen=True)
class Schedule:
    """The steps of a run: every sample of every epoch is consumed, so the last batch may reach into the next epoch."""

    total_steps: int
    warmup_steps: float
    peak_lr: float
    min_lr: float

    def lr(self, step: int) -> float:
        return lr_at(
            step,
            peak=self.peak_lr,
            floor=self.min_lr,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
        )


def schedule_of(recipe: Recipe, dataset_size: int) -> Schedule:
    """Epochs turned into steps, base lr into lr (paper, appendix A.1: lr = base_lr x batch_size / 256)."""
    optim = recipe.optim
    return Schedule(
        total_steps=math.ceil(optim.epochs * dataset_size / optim.batch_size),
        warmup_steps=optim.warmup_epochs * dataset_size / optim.batch_size,
        peak_lr=optim.base_lr * optim.batch_size / 256,
        min_lr=optim.min_lr,
    )


def train(recipe: Recipe, folder: RunFolder, stop_at_step: int | None, ranks: Ranks) -> None:
    """Takes every step of the schedule that the run's newest checkpoint has not taken yet."""
    dataset, order = open_data(recipe.data, recipe.seed)
    schedule = schedule_of(recipe, len(dataset))
    end = schedule.total_steps if stop_at_step is None else min(schedule.total_steps, stop_at_step)
    share = math.ceil(recipe.optim.batch_size / ranks.world_size)
    slices = Slices(recipe.optim.batch_size, ranks.world_size, math.ceil(share / recipe.engine.micro_batch_size))
    loader = PretrainLoader(
        dataset,
        order,
        AugmentDraws(recipe.seed, recipe.data.crop, recipe.model.image_size),
        recipe.model.image_size,
        slices,
        ranks.rank,
        threads=recipe.loader.threads or ranks.threads,
        prefetch=recipe.loader.prefetch,
        decode=recipe.loader.decode,
        max_bad_share=recipe.loader.max_bad_share,
        on_bad=folder.quarantine,
    )
    folder.refuse_other_experiment(recipe)
    target_file = target_of_run(recipe, folder)
    target = None if target_file is None else target_file.target(recipe.model)
    step = (folder.checkpoints.steps() or [0])[-1]
    if step:
        loader.load_state_dict(folder.checkpoints.loader_state(step, dataset.fingerprint, ranks.world_size))

    with process_group(ranks), contextlib.ExitStack() as stack:
        engine = build_engine(recipe, slices, target)
        if step:
            folder.checkpoints.load(engine, step)
        if ranks.rank == 0:
            if target_file is not None and target_file.path != folder.target_file:
                target_file.write(folder.target_file)
            folder.start(recipe, step)
            log = stack.enter_context(run_log(folder, step, schedule.total_steps))
        batches = iter(stack.enter_context(loader))
        clock = Clock()
        logged = step
        while step < end:
            set_lr(engine, schedule.lr(step))
            loss = train_step(engine, batches, slices.micro_batches, clock)
            step += 1
            if step % recipe.log.every_steps == 0 or step in (1, end):
                loss_value, (seconds, data_wait) = mean_over_ranks(loss), clock.take()
                images_per_s = (step - logged) * recipe.optim.batch_size / seconds
                logged = step
                if ranks.rank == 0:
                    log(
                        step,
                        {
                            "epoch": step * recipe.optim.batch_size / len(dataset),
                            "loss": loss_value,
                            "lr": schedule.lr(step - 1),
                            "images_per_s": images_per_s,
                            "data_wait": data_wait,
                        },
                    )
            if step % recipe.checkpoint.every_steps == 0 or step == end:
                weights, state = merged_weights(engine), loader.state_dict()
                folder.checkpoints.save(engine, weights, step, state, dataset.fingerprint, recipe.checkpoint.keep)


def train_step(engine: Any, batches: Iterator[Batch], micro_batches: int, clock: Clock) -> Tensor:
    """One optimizer step; this rank's part of the mean loss of the global batch, on the device."""
    total = torch.zeros((), device=engine.device)
    for _ in range(micro_batches):
        with clock.waiting():
            batch = next(batches)
        images, keys = (tensor.to(engine.device, non_blocking=True) for tensor in (batch.images, batch.keys))
        loss = engine(images, keys) * batch.weight
        engine.backward(loss)
        engine.step()
        total += loss.detach() / micro_batches
    return total


def main(args: list[str]) -> int:
    """`maelstream pretrain`; 0 when the run reached its end or --stop-at-step."""
    args = [arg for arg in args if not arg.startswith("--local_rank=")]  # the deepspeed launcher adds it
    default: Any = tyro.MISSING  # for --help
    if args and not args[0].startswith("-"):
        default = Pretrain(Path(args[0]), load_recipe(Path(args[0])), Path("runs") / Path(args[0]).stem)
    elif not {"-h", "--help"} & set(args):
        raise RecipeError("RECIPE comes first: `maelstream pretrain recipes/pretrain_vit_b16.yaml --run DIR ...`")
    command = tyro.cli(Pretrain, args=args, default=default, prog="maelstream pretrain")
    if command.print_config:
        print(dump_recipe(command.recipe), end="")
        return 0
    train(command.recipe, RunFolder(command.run), command.stop_at_step, ranks_from_environment())
    return 0


if __name__ == "__main__":
    sys.exit(run("pretrain", sys.argv[1:]))
