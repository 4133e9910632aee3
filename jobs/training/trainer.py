"""The training loop, the same for every objective: steps, log lines, evaluations and checkpoints of a run.

An `Objective` (jobs/training/pretraining.py, jobs/evaluation/classification.py) says what is trained on what. `train`
prepares a run: lock, newest good checkpoint, engine, watchdog. `Trainer` then takes its steps. A resumed run takes
exactly the steps that it would have taken without the interruption.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from signal import Signals
from typing import Any, Protocol

from torch import Tensor, nn

from maelstream.jobs.checkpointing.partition import Partition, partition_of
from maelstream.jobs.checkpointing.saver import Saver
from maelstream.jobs.checkpointing.store import CheckpointStore, State
from maelstream.jobs.distributed.health import BadSteps, Spikes, Watchdog
from maelstream.jobs.distributed.ranks import ControlGroup, Ranks, process_group
from maelstream.jobs.distributed.stop import Stop
from maelstream.jobs.recipe import AnyRecipe, ClassificationRecipe
from maelstream.jobs.run_folder.environment import record_start
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.side_files import repair
from maelstream.jobs.run_folder.status import locked
from maelstream.jobs.training.data import batch_split_of
from maelstream.jobs.training.engine import set_lr
from maelstream.jobs.training.log import Log, Reporter, no_log, run_log
from maelstream.jobs.training.resume import Resumed, frozen_tensors, newest_fitting, trained_shapes
from maelstream.jobs.training.schedule import Schedule, schedule_of
from maelstream.jobs.training.step import Flags, StepResult, train_step
from maelstream.jobs.training.summary import Datasets, already_there, end_summary, start_summary
from maelstream.jobs.training.trackers import import_trackers, trackers
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.loader import ImageLoader
from maelstream.pipeline.producer import Batch
from maelstream.pipeline.sample_source import BadSample


class Evaluator(Protocol):
    """Scores a model while it is trained and at the end; for objectives that have scores."""

    def frozen_tensors(self) -> dict[str, Tensor]:
        """Float32 tensors by name that scoring needs and the optimizer does not hold; every checkpoint keeps them."""

    def start(self, partition: Partition, control_group: ControlGroup, heartbeat: Callable[[], None]) -> None:
        """Called once, when the engine has the weights that training starts or resumes from.

        Call `heartbeat` during long work; otherwise the watchdog reports a hang.
        """

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether to evaluate after `step` of `total_steps` steps."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics of the weights after `step` steps, by name; all ranks call it together."""

    def has_result(self, folder: RunFolder) -> bool:
        """Whether the final scores of the run are recorded."""

    def record_result(self, folder: RunFolder, step: int) -> None:
        """Records the final scores after the last step; all ranks call it together."""


class Objective(Protocol):
    """What is trained, and on what."""

    recipe: Any  # a Recipe or a ClassificationRecipe

    @property
    def datasets(self) -> Datasets:
        """The opened data by its use: `data`, or `train` and `val`."""

    @property
    def evaluator(self) -> Evaluator | None:
        """Scores the model; None for objectives without scores."""

    def loader(
        self, batch_split: BatchSplit, rank: int, threads: int, on_bad: Callable[[BadSample], None]
    ) -> ImageLoader:
        """The loader of this rank's micro-batches."""

    def build_model(self, weights: dict[str, Tensor] | None) -> nn.Module:
        """The model with the weights of a checkpoint; without one, with its initial weights."""

    def build_engine(self, model: Any, batch_split: BatchSplit) -> Any:
        """A DeepSpeed engine around `model`."""

    def loss(self, engine: Any, step: int, images: Tensor, batch: Batch, micro_batch: int) -> Tensor:
        """Mean loss of a micro-batch, a scalar; `images` is on the engine's device, `step` counts from 0."""


@dataclass
class Trainer:
    """The steps of one start of a run, from `steps` to `last_step`; all ranks run it together."""

    objective: Objective
    schedule: Schedule
    last_step: int
    steps: int
    """Steps taken so far, skipped ones included."""
    loader: ImageLoader
    engine: Any
    partition: Partition
    micro_batches: int
    saver: Saver
    reporter: Reporter
    stop: Stop
    heartbeat: Callable[[], None]
    control_group: ControlGroup
    fingerprint: str
    ema_decay: float
    signal: Signals | None = None
    """The signal that ends training after this step."""
    bad_steps: BadSteps = field(init=False)
    spikes: Spikes = field(init=False)

    def __post_init__(self) -> None:
        health = self.objective.recipe.health
        self.bad_steps, self.spikes = BadSteps(health.bad_steps), Spikes(health.spike)

    def run(self) -> None:
        """Takes steps until `last_step` or a signal, then waits for the last checkpoint."""
        batches = iter(self.loader)
        while self.steps < self.last_step and self.signal is None:
            result = self.step(batches)
            self.log(result, self.evaluate())
            self.save()
        self.saver.finish()

    def step(self, batches: Iterator[Batch]) -> StepResult:
        """Takes the next step."""
        set_lr(self.engine, self.schedule.lr(self.steps))
        loss = partial(self.objective.loss, self.engine, self.steps)
        result = train_step(
            self.engine,
            loss,
            batches,
            self.micro_batches,
            self.reporter.clock,
            self.heartbeat,
            self.control_group,
            self.flags,
        )
        if result.taken and self.ema_decay:
            self.partition.update_ema(self.ema_decay)
        self.steps += 1
        self.signal = result.flags.signal
        failure = self.saver.advance(result.flags.writing, result.flags.write_failed)
        if failure and self.control_group.ranks.rank == 0:
            message = f"maelstream {self.objective.recipe.job}: {failure}; training continues"
            print(message, file=sys.stderr, flush=True)
        return result

    def flags(self) -> Flags:
        """What this rank reports to the others at the end of a step."""
        received = {} if self.stop.received is None else {self.stop.received.name.lower(): 1.0}
        return Flags(float(self.saver.is_writing), float(self.saver.has_failed), **received)

    def evaluate(self) -> dict[str, float]:
        """The evaluator's metrics where they are due; its time does not count as training time."""
        evaluator = self.objective.evaluator
        if evaluator is None or not evaluator.is_due(self.steps, self.schedule.total_steps):
            return {}
        with self.reporter.clock.stopped():
            return evaluator.evaluate(self.steps)

    def log(self, result: StepResult, scores: dict[str, float]) -> None:
        """Logs a step: every `log.every_steps`, the first, the last, and any that is unusual or evaluated.

        Raises:
            DivergedError: `health.bad_steps` steps in a row were skipped.
        """
        recipe, step = self.objective.recipe, self.steps
        is_spike = result.taken and self.spikes.note(result.loss)
        is_regular = step % recipe.log.every_steps == 0 or step in (1, self.last_step)
        if is_regular or is_spike or scores or not result.taken:
            self.reporter.step(
                step,
                epoch=step * recipe.optim.batch_size / len(self.loader.dataset),
                loss=result.loss if result.taken else None,
                grad_norm=float(self.engine.get_global_grad_norm()) if result.taken else None,
                skipped=step - self.partition.steps(),
                spike=is_spike,
                scores=scores,
            )
        self.bad_steps.note(not result.taken, step, "" if result.taken else self.saver.newest)

    def save(self) -> None:
        """Starts a checkpoint every `checkpoint.every_steps`, after the last step and before a stop."""
        every = self.objective.recipe.checkpoint.every_steps
        if self.steps % every == 0 or self.steps == self.last_step or self.signal is not None:
            state = State(
                loader=self.loader.state_dict(),
                dataset=self.fingerprint,
                optimizer_steps=self.partition.steps(),
                world_size=self.control_group.ranks.world_size,
            )
            self.saver.save(self.partition, self.steps, state, frozen_tensors(self.objective))


def train(
    objective: Objective,
    folder: RunFolder,
    stop_at_step: int | None,
    ranks: Ranks,
    on_start: Callable[[], None] = lambda: None,
    on_checkpoint: Callable[[int, int], None] = lambda step, total_steps: None,
) -> int:
    """Starts or resumes a run and trains to the end of its schedule, `stop_at_step` or a signal; returns the exit code.

    Rank 0 calls `on_start` when the run is locked and about to train, and `on_checkpoint(step, total_steps)`, in the
    thread that writes checkpoints, when a checkpoint is complete.
    """
    recipe = objective.recipe
    batch_split = batch_split_of(recipe, ranks.world_size)
    loader = objective.loader(batch_split, ranks.rank, recipe.loader.threads or ranks.threads, folder.quarantine)
    schedule = schedule_of(recipe, len(loader.dataset))
    fingerprint = loader.dataset.fingerprint
    last_step = schedule.total_steps if stop_at_step is None else min(schedule.total_steps, stop_at_step)
    modules = import_trackers(recipe)
    silent_s, store, evaluator = recipe.health.silent_s, folder.checkpoints, objective.evaluator

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop(recipe.health.grace_s))
        control_group = stack.enter_context(process_group(ranks, 2 * silent_s))
        stack.enter_context(locked(folder.lock, control_group))
        if ranks.rank == 0:
            store.sweep()
            for message in repair(folder):
                print(f"maelstream {recipe.job}: {message}", file=sys.stderr, flush=True)
        step, messages = store.newest_good(control_group)
        if step >= last_step:
            has_result = evaluator is None or not control_group.any(not evaluator.has_result(folder))
            if step < schedule.total_steps or has_result:
                if ranks.rank == 0:
                    print(already_there(recipe, folder.path, step, schedule.total_steps), flush=True)
                return 0
        resumed, misfits = newest_fitting(objective, loader, store, step, bool(ema_decay(recipe)), control_group)
        step, messages = (0, []) if resumed is None else (resumed.step, messages + misfits)
        engine, partition, shapes = build(objective, batch_split, store, resumed)

        log: Log = no_log
        if ranks.rank == 0:
            for message in messages:
                print(f"maelstream {recipe.job}: {message}", file=sys.stderr, flush=True)
            on_start()
            folder.start(recipe, step)
            record_start(folder, step, ranks)
            model, datasets = engine.module, objective.datasets
            print(
                start_summary(recipe, datasets, model, ranks, batch_split, schedule, step, last_step, folder.path),
                flush=True,
            )
            recorders = stack.enter_context(trackers(modules, recipe, folder))
            log = stack.enter_context(run_log(recipe.job, folder, step, schedule.total_steps, recorders))
        watchdog = stack.enter_context(Watchdog(folder.ranks, ranks.rank, ranks.world_size, silent_s))
        if evaluator is not None:
            evaluator.start(partition, control_group, watchdog.heartbeat)
        checkpoint = recipe.checkpoint
        saver = Saver(
            store,
            control_group,
            shapes,
            checkpoint.keep,
            checkpoint.keep_every_steps,
            watchdog.heartbeat,
            lambda step: on_checkpoint(step, schedule.total_steps),
        )
        reporter = stack.enter_context(Reporter(recipe, folder, schedule, ranks, step, log))
        trainer = Trainer(
            objective=objective,
            schedule=schedule,
            last_step=last_step,
            steps=step,
            loader=stack.enter_context(loader),
            engine=engine,
            partition=partition,
            micro_batches=batch_split.micro_batches,
            saver=saver,
            reporter=reporter,
            stop=stop,
            heartbeat=watchdog.heartbeat,
            control_group=control_group,
            fingerprint=fingerprint,
            ema_decay=ema_decay(recipe),
        )
        stop.defer()
        began = time.monotonic()
        trainer.run()
        if trainer.steps == schedule.total_steps and evaluator is not None:
            evaluator.record_result(folder, trainer.steps)
        reporter.ended(trainer.steps, trainer.signal)
        if ranks.rank == 0:
            seconds, why = time.monotonic() - began, trainer.signal.name if trainer.signal else "--stop-at-step"
            print(end_summary(recipe, folder.path, step, trainer.steps, schedule.total_steps, seconds, why), flush=True)
        return 0 if trainer.signal is None else 128 + trainer.signal


def build(
    objective: Objective, batch_split: BatchSplit, store: CheckpointStore, resumed: Resumed | None
) -> tuple[Any, Partition, dict[str, tuple[int, ...]]]:
    """Builds the engine with the weights and moments of a checkpoint, or with initial ones.

    Returns the engine, its partition, and the shapes of the tensors that a checkpoint merges, by name.
    """
    model = objective.build_model(None) if resumed is None else resumed.model
    shapes = trained_shapes(model)  # before the engine is built
    shapes |= {name: tuple(tensor.shape) for name, tensor in frozen_tensors(objective).items()}
    engine = objective.build_engine(model, batch_split)
    partition = partition_of(engine)
    if ema_decay(objective.recipe):
        partition = partition.keep_ema()
    if resumed is not None:
        store.restore(resumed.step, resumed.state, partition)
    return engine, partition, shapes


def ema_decay(recipe: AnyRecipe) -> float:
    """Decay per step of the EMA of the weights; 0 if the run keeps none."""
    return recipe.tuning.ema if isinstance(recipe, ClassificationRecipe) else 0.0
