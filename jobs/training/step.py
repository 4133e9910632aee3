"""One optimizer step: forward and backward passes of its micro-batches, one small collective, then the update.

NaN or Inf on any rank makes all ranks skip the update.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from maelstream.jobs.distributed.ranks import ControlGroup
from maelstream.jobs.distributed.stop import SIGNALS
from maelstream.jobs.training.engine import clear_accumulated_gradients, gradients_are_finite, without_update
from maelstream.jobs.training.log import Clock
from maelstream.pipeline.producer import Batch
from maelstream.pipeline.tracing import trace_range


@dataclass(frozen=True)
class Flags:
    """What a rank reports at the end of a step, as numbers that the ranks sum: above 0 means on at least one rank."""

    writing: float = 0.0
    """The rank's thread still writes a checkpoint."""
    write_failed: float = 0.0
    sigterm: float = 0.0
    sigusr1: float = 0.0
    sigint: float = 0.0
    sighup: float = 0.0
    sigxcpu: float = 0.0

    @property
    def signal(self) -> signal.Signals | None:
        """The signal that some rank received."""
        return next((number for number in SIGNALS if getattr(self, number.name.lower())), None)


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step, the same on all ranks."""

    loss: float
    """Mean over the global batch."""
    taken: bool
    """False when NaN or Inf on any rank made all ranks skip the update."""
    flags: Flags
    """Sums over all ranks."""


def train_step(
    engine: Any,
    loss_of: Callable[[Tensor, Batch, int], Tensor],
    batches: Iterator[Batch],
    micro_batches: int,
    clock: Clock,
    heartbeat: Callable[[], None],
    control_group: ControlGroup,
    flags: Callable[[], Flags] = Flags,
) -> StepResult:
    """Takes one optimizer step over the next `micro_batches` of `batches`.

    `loss_of(images, batch, number)` is the mean loss of micro-batch `number`; `images` is on the engine's device.
    `flags` reports this rank's flags after the backward pass. All ranks call this function together.
    """
    total = torch.zeros((), device=engine.device)
    for number in range(micro_batches):
        heartbeat()
        with clock.waiting():
            batch = next(batches)
        heartbeat()
        with trace_range("copy"):
            images = batch.images.to(engine.device, non_blocking=True)
        with trace_range("step"):
            loss = loss_of(images, batch, number) * batch.weight
            heartbeat()  # a rank stuck in its forward pass then counts fewer heartbeats than ranks that wait for it
            engine.backward(loss)
            total += loss.detach() / micro_batches
            if number + 1 < micro_batches:
                engine.step()
    is_bad = not (total.isfinite() and gradients_are_finite(engine))
    with trace_range("comm"):
        loss_sum, bad_ranks, *sums = control_group.sums([total.item(), float(is_bad), *astuple(flags())])
    with trace_range("optimizer"), without_update(engine) if bad_ranks else contextlib.nullcontext():
        engine.step()
    taken = not bad_ranks and not engine.optimizer.overflow
    if not taken:
        clear_accumulated_gradients(engine)
    return StepResult(loss_sum / control_group.ranks.world_size, taken, Flags(*sums))
