"""Pictures of a run as it goes on: at its first checkpoint, at the first one of every so many epochs, at the last.

They are made from the checkpoint's own file, by the thread that wrote it, on the CPU: no rank waits for another, no
weight is gathered, and the step sees nothing of it. What goes wrong is told and costs the pictures alone.
"""

import math
import re
import sys
from functools import cached_property

from maelstream.jobs.recipe import Recipe
from maelstream.jobs.reconstruct import (
    Shown,
    own_dataset,
    packed_images,
    possible_ratios,
    reconstructions,
    trained_model,
)
from maelstream.jobs.reporting.pictures import About, write_pictures
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.target_file import target_of_run
from maelstream.shards.dataset import Dataset

_COUNT = 6
_NAME = re.compile(r"step-(\d{8})")


def is_due(step: int, earlier: list[int], steps_an_epoch: float, every_epochs: float, last_step: int) -> bool:
    """Whether the checkpoint of `step` is to be shown, after those of `earlier` steps."""
    if every_epochs == 0:
        return False
    if not earlier or step == last_step:
        return True
    intervals = (math.floor(s / steps_an_epoch / every_epochs) for s in (step, max(earlier)))
    return next(intervals) > next(intervals)


class Gallery:
    """Shows checkpoints of a run in its folder; call it with the step of one that has just been written."""

    def __init__(self, recipe: Recipe, folder: RunFolder, dataset_size: int):
        self._recipe, self._folder = recipe, folder
        self._steps_an_epoch = dataset_size / recipe.optim.batch_size

    def __call__(self, step: int, last_step: int) -> None:
        every = self._recipe.log.reconstruct_every_epochs
        try:
            due = is_due(step, self._shown_before(step), self._steps_an_epoch, every, last_step)
            if due and self._can_be_shown():
                self._write(step)
        except Exception as error:  # whatever it is, it must not end the run
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            told = f"maelstream pretrain: no pictures of step {step} ({reason}); training goes on"
            print(told, file=sys.stderr, flush=True)

    def _can_be_shown(self) -> bool:
        """Not so a stream, which has no samples to choose, and tokens that nothing turns into pixels."""
        target_file = target_of_run(self._recipe, self._folder)
        return not self._recipe.data.stream.urls and (target_file is None or target_file.shows_pixels)

    def _shown_before(self, step: int) -> list[int]:
        names = (_NAME.fullmatch(path.parent.name) for path in self._folder.reconstructions.glob("*/about.json"))
        return [shown for name in names if name and (shown := int(name[1])) < step]

    def _write(self, step: int) -> None:
        config, weights = self._recipe.model, self._folder.checkpoints.at(step)
        results = reconstructions(trained_model(self._folder, weights), self._images, possible_ratios(config))
        about = About.of(results, weights.name, step, self._images.source, self._images.names, config.target)
        write_pictures(self._folder.reconstructions / weights.name, results, about)

    @cached_property
    def _images(self) -> Shown:
        dataset = Dataset.open(own_dataset(self._recipe))
        return packed_images(dataset, min(_COUNT, len(dataset)), self._recipe)
