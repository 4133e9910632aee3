"""The schedule of a run: how many steps it takes and the learning rate of each."""

import math
from dataclasses import dataclass

from maelstream.jobs.recipe import AnyRecipe
from maelstream.model.optimise import lr_at


@dataclass(frozen=True)
class Schedule:
    """The steps of a run. Every sample of every epoch is used, so the last batch may reach into the next epoch."""

    total_steps: int
    warmup_steps: float
    peak_lr: float
    min_lr: float

    def lr(self, step: int) -> float:
        """Learning rate of `step`, counted from 0: linear warm-up, then half a cosine."""
        return lr_at(
            step,
            peak=self.peak_lr,
            floor=self.min_lr,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
        )


def schedule_of(recipe: AnyRecipe, dataset_size: int) -> Schedule:
    """Converts epochs to steps and the base lr to the lr (paper, appendix A.1: lr = base_lr x batch_size / 256)."""
    optim = recipe.optim
    return Schedule(
        total_steps=math.ceil(optim.epochs * dataset_size / optim.batch_size),
        warmup_steps=optim.warmup_epochs * dataset_size / optim.batch_size,
        peak_lr=optim.base_lr * optim.batch_size / 256,
        min_lr=optim.min_lr,
    )
