"""Training, whatever the model: locks, checkpoints, health, signals and logs around the steps of a *task*.

A task (maelstream.jobs.pretrain, maelstream.jobs.evaluation.classification) says what is trained on what; the loop is the same for all of them, and so
is what they promise: a run that was stopped takes the steps that it would have taken.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from maelstream.jobs.checkpointing.partition import Partition, partition_of
from maelstream.jobs.checkpointing.saver import Saver
from maelstream.jobs.checkpointing.store import State
from maelstream.jobs.distributed.health import BadSteps, Spikes, Watchdog
from maelstream.jobs.distributed.ranks import ControlGroup, Ranks, process_group
from maelstream.jobs.distributed.stop import SIGNALS, Stop
from maelstream.jobs.recipe import AnyRecipe
from maelstream.jobs.run_folder.environment import record_start
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.status import Status, locked, read_status
from maelstream.jobs.training.data import batch_split_of
from maelstream.jobs.training.engine import clear_accumulated_gradients, gradients_are_finite, set_lr, without_update
from maelstream.jobs.training.log import Clock, Log, memory_gib, mfu, run_log
from maelstream.jobs.training.trackers import import_trackers, trackers
from maelstream.model.optimise import lr_at
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.loader import Batch, ImageLoader
from maelstream.pipeline.sample_source import BadSample
from maelstream.pipeline.tracing import stage

Loss = Callable[[Any, Tensor, Batch, int], Tensor]
"""Mean loss of a micro-batch, by an engine from images on its device and what else the batch holds; the number is that
of the micro-batch in its step."""


class Task(Protocol):
    """What is trained, and on what."""

    command: str
    recipe: Any  # a Recipe or a ClassificationRecipe
    samples: int
    """Of the dataset."""
    fingerprint: str
    """Of the dataset."""
    ema: float
    """Decay of the mean of the weights that is kept; 0: none."""

    def loader(
        self, batch_split: BatchSplit, rank: int, threads: int, on_bad: Callable[[BadSample], None]
    ) -> ImageLoader: ...

    def build(self, trained: dict[str, Tensor] | None) -> nn.Module:
        """The model with the weights of a checkpoint, or as it begins."""

    def engine(self, model: Any, batch_split: BatchSplit) -> Any: ...

    def joined(
        self, engine: Any, partition: Partition, control_group: ControlGroup, heartbeat: Callable[[], None]
    ) -> None:
        """The ranks have met and the engine stands, with the weights that the run goes on with.

        What takes long calls `heartbeat` as it gets on, or this rank is taken for silent.
        """

    def fixed(self) -> dict[str, Tensor]:
        """Float32 tensors of the model that a checkpoint needs and the optimizer has no part of, by name."""

    def loss(self, step: int) -> Loss:
        """Of a step, counted from 0."""

    def keep(self, folder: RunFolder) -> None:
        """Rank 0 puts beside the run what it cannot go on without."""

    def due(self, step: int, total: int) -> bool:
        """Whether something is to be measured after `step` steps of `total`."""

    def measure(self, step: int) -> dict[str, float]:
        """What the metrics say beside the loss; all ranks call it together."""

    def published(self, step: int, total: int) -> None:
        """A checkpoint of `step` of `total` stands; called in the thread of rank 0 that wrote it."""

    def finished(self, folder: RunFolder) -> bool:
        """Whether the result of a run that has taken all steps stands."""

    def finish(self, folder: RunFolder, step: int) -> None:
        """After the last step; all ranks call it together."""


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


def schedule_of(recipe: AnyRecipe, dataset_size: int) -> Schedule:
    """Epochs turned into steps, base lr into lr (paper, appendix A.1: lr = base_lr x batch_size / 256)."""
    optim = recipe.optim
    return Schedule(
        total_steps=math.ceil(optim.epochs * dataset_size / optim.batch_size),
        warmup_steps=optim.warmup_epochs * dataset_size / optim.batch_size,
        peak_lr=optim.base_lr * optim.batch_size / 256,
        min_lr=optim.min_lr,
    )


def train(task: Task, folder: RunFolder, stop_at_step: int | None, ranks: Ranks) -> int:
    """Takes every step of the schedule that the run's newest good checkpoint has not taken yet; the exit code."""
    recipe = task.recipe
    schedule = schedule_of(recipe, task.samples)
    end = schedule.total_steps if stop_at_step is None else min(schedule.total_steps, stop_at_step)
    batch_split = batch_split_of(recipe, ranks.world_size)
    loader = task.loader(batch_split, ranks.rank, recipe.loader.threads or ranks.threads, folder.quarantine)
    modules = import_trackers(recipe)
    health, store = recipe.health, folder.checkpoints

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop(health.grace_s))
        control_group = stack.enter_context(process_group(ranks, 2 * health.silent_s))
        stack.enter_context(locked(folder.lock, control_group))
        if ranks.rank == 0:
            store.sweep()
        step, told = store.newest_good(control_group)
        if step >= end and (step < schedule.total_steps or not control_group.any(not task.finished(folder))):
            return 0
        state = store.state(step, task.fingerprint) if step else None
        if state is not None:
            loader.load_state_dict(state["loader"])
        model = task.build(store.weights(step) if step else None)
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        shapes = {name: tuple(parameter.shape) for name, parameter in trained}
        shapes |= {name: tuple(tensor.shape) for name, tensor in task.fixed().items()}
        engine = task.engine(model, batch_split)
        partition = partition_of(engine)
        if task.ema:
            partition = partition.keep_ema()
        if state is not None:
            store.restore(step, state, partition)
        log: Log = unheard
        if ranks.rank == 0:
            for line in told:
                print(f"maelstream {task.command}: {line}", file=sys.stderr, flush=True)
            task.keep(folder)
            folder.start(recipe, step)
            record_start(folder, step, ranks)
            recorders = stack.enter_context(trackers(modules, recipe, folder))
            log = stack.enter_context(run_log(task.command, folder, step, schedule.total_steps, recorders))
        watch = stack.enter_context(Watchdog(folder.ranks, ranks.rank, ranks.world_size, health.silent_s))
        task.joined(engine, partition, control_group, watch.heartbeat)
        checkpoint = recipe.checkpoint
        published = partial(task.published, total=schedule.total_steps)
        saver = Saver(
            store, control_group, shapes, checkpoint.keep, checkpoint.keep_every_steps, watch.heartbeat, published
        )
        reporter = Reporter(recipe, folder, schedule, ranks, step, log)
        stack.enter_context(reporter)
        batches = iter(stack.enter_context(loader))
        bad_steps, spikes = BadSteps(health.bad_steps), Spikes(health.spike)
        signal = None
        stop.training()
        while step < end and signal is None:
            set_lr(engine, schedule.lr(step))
            flags = lambda: [*saver.flags, *stop.flags]  # noqa: E731
            loss, taken, sums = train_step(
                engine,
                task.loss(step),
                batches,
                batch_split.micro_batches,
                reporter.clock,
                watch.heartbeat,
                control_group,
                flags,
            )
            if taken and task.ema:
                partition.update_ema(task.ema)
            step += 1
            signal = Stop.agreed(sums[-len(SIGNALS) :])
            if (failure := saver.advance(*sums[:2])) and ranks.rank == 0:
                print(f"maelstream {task.command}: {failure}; training goes on", file=sys.stderr, flush=True)
            spike = taken and spikes.note(loss)
            if due := task.due(step, schedule.total_steps):
                with reporter.clock.stopped():
                    measured = task.measure(step)
            if step % recipe.log.every_steps == 0 or step in (1, end) or spike or not taken or due:
                norm = float(engine.get_global_grad_norm()) if taken else None
                epoch = step * recipe.optim.batch_size / task.samples
                more = measured if due else {}
                reporter.step(step, epoch, loss if taken else None, norm, step - partition.steps(), spike, more)
            bad_steps.note(not taken, step, f"{store.at(store.steps()[-1])}" if store.steps() else "none yet")
            if step % recipe.checkpoint.every_steps == 0 or step == end or signal is not None:
                state = State(
                    loader=loader.state_dict(),
                    dataset=task.fingerprint,
                    optimizer_steps=partition.steps(),
                    world_size=ranks.world_size,
                )
                saver.save(partition, step, state, task.fixed())
        saver.finish()
        if step == schedule.total_steps:
            task.finish(folder, step)
        reporter.ended(step, signal)
        return 0 if signal is None else 128 + signal


def train_step(
    engine: Any,
    loss_of: Loss,
    batches: Iterator[Batch],
    micro_batches: int,
    clock: Clock,
    heartbeat: Callable[[], None],
    control_group: ControlGroup,
    flags: Callable[[], list[float]],
) -> tuple[float, bool, list[float]]:
    """One optimizer step, which NaN or Inf on any rank makes all of them skip.

    Returns the mean loss of the global batch, whether the step was taken, and the sums of all ranks' `flags`.
    """
    total = torch.zeros((), device=engine.device)
    for number in range(micro_batches):
        heartbeat()
        with clock.waiting():
            batch = next(batches)
        heartbeat()
        with stage("copy"):
            images = batch.images.to(engine.device, non_blocking=True)
        with stage("step"):
            loss = loss_of(engine, images, batch, number) * batch.weight
            heartbeat()  # who is stuck in the forward pass alone has not come as far as those that wait for its gradients
            engine.backward(loss)
            total += loss.detach() / micro_batches
            if number + 1 < micro_batches:
                engine.step()
    bad = not (total.isfinite() and gradients_are_finite(engine))
    with stage("comm"):
        loss_sum, bad_ranks, *sums = control_group.sums([total.item(), float(bad), *flags()])
    with stage("optimizer"), without_update(engine) if bad_ranks else contextlib.nullcontext():
        engine.step()
    taken = not bad_ranks and not engine.optimizer.overflow
    if not taken:
        clear_accumulated_gradients(engine)
    return loss_sum / control_group.ranks.world_size, taken, sums


def unheard(step: int, values: dict[str, Any]) -> None:
    """The log of ranks other than 0, which see the same."""


class Reporter:
    """Measures and records log steps and how the run ends, on rank 0; use it as a context manager."""

    def __init__(self, recipe: AnyRecipe, folder: RunFolder, schedule: Schedule, ranks: Ranks, step: int, log: Log):
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
        self,
        step: int,
        epoch: float,
        loss: float | None,
        grad_norm: float | None,
        skipped: int,
        spike: bool,
        more: dict[str, float],
    ) -> None:
        """`loss` and `grad_norm` are None where the step was `skipped`, which counts them; `more` is the task's."""
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
        values |= more
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
