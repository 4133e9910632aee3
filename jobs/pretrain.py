"""`maelstream pretrain RECIPE --run DIR`: trains a masked autoencoder, or goes on with the run that lies in DIR.

Alone it is one rank; under `maelstream launch`, `deepspeed --module jobs.pretrain`, `torchrun --module` or `srun` it is
one of many. The run starts from its newest good checkpoint, if it has one, and then takes the same steps as if it had
never stopped.
"""

import jobs.orphan  # noqa: F401  before anything slow is imported

# isort: split
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from jobs.checkpoint import State
from jobs.command import run
from jobs.data import loader_of, open_data, slices_of
from jobs.engine import (
    build_engine,
    build_model,
    forget_gradients,
    gradients_are_finite,
    set_lr,
    without_update,
)
from jobs.health import BadSteps, Spikes, Watch
from jobs.log import Clock, Log, memory_gib, mfu, run_log
from jobs.partition import partition_of
from jobs.ranks import Council, Ranks, process_group, ranks_from_environment
from jobs.recipe import Recipe, RecipeError, dump_recipe, load_recipe
from jobs.runfolder import RunFolder
from jobs.saver import Saver
from jobs.status import Status, locked, read_status
from jobs.stop import SIGNALS, Stop
from jobs.targetfile import target_of_run
from jobs.trackers import import_trackers, trackers
from model.optimise import lr_at
from pipeline.loader import Batch
from pipeline.ranges import stage


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


def train(recipe: Recipe, folder: RunFolder, stop_at_step: int | None, allowed: tuple[str, ...], ranks: Ranks) -> int:
    """Takes every step of the schedule that the run's newest good checkpoint has not taken yet; the exit code."""
    dataset, order = open_data(recipe.data, recipe.seed)
    schedule = schedule_of(recipe, len(dataset))
    end = schedule.total_steps if stop_at_step is None else min(schedule.total_steps, stop_at_step)
    slices = slices_of(recipe, ranks.world_size)
    threads = recipe.loader.threads or ranks.threads
    loader = loader_of(recipe, dataset, order, slices, ranks.rank, threads, folder.quarantine)
    folder.refuse_other_experiment(recipe, allowed)
    target_file = target_of_run(recipe, folder)
    target = None if target_file is None else target_file.target(recipe.model)
    modules = import_trackers(recipe)
    health, store = recipe.health, folder.checkpoints

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop(health.grace_s))
        council = stack.enter_context(process_group(ranks, 2 * health.silent_s))
        stack.enter_context(locked(folder.lock, council))
        if ranks.rank == 0:
            store.sweep()
        step, told = store.newest_good(council)
        if step >= end:
            return 0
        model = build_model(recipe, target)
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        shapes = {name: tuple(parameter.shape) for name, parameter in trained}
        if step:
            state = store.state(step, dataset.fingerprint)
            loader.load_state_dict(state["loader"])
            model.load_state_dict(store.weights(step), strict=False)  # buffers are no weights
        engine = build_engine(recipe, slices, model)
        partition = partition_of(engine)
        if step:
            store.restore(step, state, partition)
        log: Log = unheard
        if ranks.rank == 0:
            for line in told:
                print(f"maelstream pretrain: {line}", file=sys.stderr, flush=True)
            if target_file is not None and target_file.path != folder.target_file:
                target_file.write(folder.target_file)
            folder.start(recipe, step)
            recorders = stack.enter_context(trackers(modules, recipe, folder))
            log = stack.enter_context(run_log(folder, step, schedule.total_steps, recorders))
        watch = stack.enter_context(Watch(folder.ranks, ranks.rank, ranks.world_size, health.silent_s))
        checkpoint = recipe.checkpoint
        saver = Saver(store, council, shapes, checkpoint.keep, checkpoint.keep_every_steps, watch.beat)
        reporter = Reporter(recipe, folder, schedule, ranks, step, log)
        stack.enter_context(reporter)
        batches = iter(stack.enter_context(loader))
        bad_steps, spikes = BadSteps(health.bad_steps), Spikes(health.spike)
        signal = None
        stop.training()
        while step < end and signal is None:
            set_lr(engine, schedule.lr(step))
            signs = lambda: [*saver.signs, *stop.signs]  # noqa: E731
            loss, taken, sums = train_step(
                engine, batches, slices.micro_batches, reporter.clock, watch.beat, council, signs
            )
            step += 1
            signal = Stop.agreed(sums[-len(SIGNALS) :])
            if (failure := saver.advance(*sums[:2])) and ranks.rank == 0:
                print(f"maelstream pretrain: {failure}; training goes on", file=sys.stderr, flush=True)
            spike = taken and spikes.note(loss)
            if step % recipe.log.every_steps == 0 or step in (1, end) or spike or not taken:
                norm = float(engine.get_global_grad_norm()) if taken else None
                epoch = step * recipe.optim.batch_size / len(dataset)
                reporter.step(step, epoch, loss if taken else None, norm, step - partition.steps(), spike)
            bad_steps.note(not taken, step, f"{store.at(store.steps()[-1])}" if store.steps() else "none yet")
            if step % recipe.checkpoint.every_steps == 0 or step == end or signal is not None:
                state = State(
                    loader=loader.state_dict(),
                    dataset=dataset.fingerprint,
                    optimizer_steps=partition.steps(),
                    world_size=ranks.world_size,
                )
                saver.save(partition, step, state)
        saver.finish()
        reporter.ended(step, signal)
        return 0 if signal is None else 128 + signal


def train_step(
    engine: Any,
    batches: Iterator[Batch],
    micro_batches: int,
    clock: Clock,
    beat: Callable[[], None],
    council: Council,
    signs: Callable[[], list[float]],
) -> tuple[float, bool, list[float]]:
    """One optimizer step, which NaN or Inf on any rank makes all of them skip.

    Returns the mean loss of the global batch, whether the step was taken, and the sums of all ranks' `signs`.
    """
    total = torch.zeros((), device=engine.device)
    for number in range(micro_batches):
        beat()
        with clock.waiting():
            batch = next(batches)
        beat()
        with stage("copy"):
            images, keys = (tensor.to(engine.device, non_blocking=True) for tensor in (batch.images, batch.keys))
        with stage("step"):
            loss = engine(images, keys) * batch.weight
            beat()  # who is stuck in the forward pass alone has not come as far as those that wait for its gradients
            engine.backward(loss)
            total += loss.detach() / micro_batches
            if number + 1 < micro_batches:
                engine.step()
    bad = not (total.isfinite() and gradients_are_finite(engine))
    with stage("comm"):
        loss_sum, bad_ranks, *sums = council.sums([total.item(), float(bad), *signs()])
    with stage("optimizer"), without_update(engine) if bad_ranks else contextlib.nullcontext():
        engine.step()
    taken = not bad_ranks and not engine.optimizer.overflow
    if not taken:
        forget_gradients(engine)
    return loss_sum / council.ranks.world_size, taken, sums


def unheard(step: int, values: dict[str, Any]) -> None:
    """The log of ranks other than 0, which see the same."""


class Reporter:
    """Measures and records log steps and how the run ends, on rank 0; use it as a context manager."""

    def __init__(self, recipe: Recipe, folder: RunFolder, schedule: Schedule, ranks: Ranks, step: int, log: Log):
        self._recipe, self._folder, self._schedule, self._ranks, self._log = recipe, folder, schedule, ranks, log
        self._step = self._logged = step
        self.clock = Clock()

    def __enter__(self) -> "Reporter":
        self._status("running")
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """A rank that meets an error says so; the others, which lose it, leave that standing."""
        status = read_status(self._folder.status)
        if error is not None and (status is None or status.state != "failed"):
            Status("failed", self._step, self._schedule.total_steps, self._ranks.world_size, str(error)).write(
                self._folder.status
            )

    def step(
        self, step: int, epoch: float, loss: float | None, grad_norm: float | None, skipped: int, spike: bool
    ) -> None:
        """`loss` and `grad_norm` are None where the step was `skipped`, which counts them."""
        seconds, data_wait = self.clock.take()
        images_per_s = (step - self._logged) * self._recipe.optim.batch_size / seconds
        self._step = self._logged = step
        values = {
            "epoch": epoch,
            "loss": loss,
            "lr": self._schedule.lr(step - 1),
            "grad_norm": grad_norm,
            "images_per_s": images_per_s,
            "data_wait": data_wait,
            "memory_gib": memory_gib(),
            "skipped": skipped,
            "spike": spike,
        }
        if (utilisation := mfu(self._recipe, images_per_s, self._ranks.world_size)) is not None:
            values["mfu"] = utilisation
        self._log(step, values)
        self._status("running")

    def ended(self, step: int, signal: Any) -> None:
        """`signal` is what stopped the run, None when it reached its end."""
        self._step = step
        if signal is not None:
            self._status("stopped", signal.name)
        elif step < self._schedule.total_steps:
            self._status("stopped", "--stop-at-step")
        else:
            self._status("finished")

    def _status(self, state: Any, why: str = "") -> None:
        if self._ranks.rank == 0:
            Status(state, self._step, self._schedule.total_steps, self._ranks.world_size, why).write(
                self._folder.status
            )


def main(args: list[str]) -> int:
    """`maelstream pretrain`; 0 when the run reached its end or --stop-at-step."""
    args = [arg for arg in args if not arg.startswith(("--local_rank=", "--local-rank="))]  # deepspeed adds it
    default: Any = tyro.MISSING  # for --help
    if args and not args[0].startswith("-"):
        default = Pretrain(Path(args[0]), load_recipe(Path(args[0])), Path("runs") / Path(args[0]).stem)
    elif not {"-h", "--help"} & set(args):
        raise RecipeError("RECIPE comes first: `maelstream pretrain recipes/pretrain_vit_b16.yaml --run DIR ...`")
    command = tyro.cli(Pretrain, args=args, default=default, prog="maelstream pretrain")
    if command.print_config:
        print(dump_recipe(command.recipe), end="")
        return 0
    folder = RunFolder(command.run)
    return train(command.recipe, folder, command.stop_at_step, command.allow, ranks_from_environment())


if __name__ == "__main__":
    sys.exit(run("pretrain", sys.argv[1:]))
