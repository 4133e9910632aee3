"""Reconstructions that a run makes of its own checkpoints while it trains.

They are made for the first checkpoint, for the first one in each interval of epochs, and for the last. The thread that
wrote the checkpoint makes them on the CPU from the checkpoint's own file: no rank waits, no weight is gathered, and the
training step does not slow down. An error is reported and costs only the reconstructions.
"""

import math
import re
import sys
from functools import cached_property

from maelstream.jobs.recipe import Recipe
from maelstream.jobs.reporting.reconstruction import (
    InputImages,
    dataset_images,
    possible_ratios,
    reconstruct,
    run_dataset,
    trained_model,
)
from maelstream.jobs.reporting.reconstruction_files import ReconstructionInfo, write_reconstructions
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.target_file import run_target_file
from maelstream.shards.dataset import Dataset

_COUNT = 6  # images
_NAME = re.compile(r"step-(\d{8})")


def is_due(step: int, earlier: list[int], steps_per_epoch: float, every_epochs: float, last_step: int) -> bool:
    """Whether to reconstruct the checkpoint of `step`, given the `earlier` steps that were reconstructed."""
    if every_epochs == 0:
        return False
    if not earlier or step == last_step:
        return True
    intervals = (math.floor(s / steps_per_epoch / every_epochs) for s in (step, max(earlier)))
    return next(intervals) > next(intervals)


class CheckpointReconstructor:
    """Writes reconstructions into the run's folder; call it with the step of each newly written checkpoint."""

    def __init__(self, recipe: Recipe, folder: RunFolder, dataset_size: int):
        self._recipe, self._folder = recipe, folder
        self._steps_per_epoch = dataset_size / recipe.optim.batch_size

    def __call__(self, step: int, last_step: int) -> None:
        every = self._recipe.log.reconstruct_every_epochs
        try:
            due = is_due(step, self._earlier_steps(step), self._steps_per_epoch, every, last_step)
            if due and self._is_possible():
                self._write(step)
        except Exception as error:  # no error here may end the run
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            message = f"maelstream pretrain: no reconstructions of step {step} ({reason}); training continues"
            print(message, file=sys.stderr, flush=True)

    def _is_possible(self) -> bool:
        """False for a stream, which cannot be read by sample number, and for tokens without a decoder to pixels."""
        target_file = run_target_file(self._recipe, self._folder)
        return not self._recipe.data.stream.urls and (target_file is None or target_file.shows_pixels)

    def _earlier_steps(self, step: int) -> list[int]:
        names = (_NAME.fullmatch(path.parent.name) for path in self._folder.reconstructions.glob("*/about.json"))
        return [earlier for name in names if name and (earlier := int(name[1])) < step]

    def _write(self, step: int) -> None:
        config, weights = self._recipe.model, self._folder.checkpoints.at(step)
        results = reconstruct(trained_model(self._folder, weights), self._images, possible_ratios(config))
        info = ReconstructionInfo.describe(
            results, weights.name, step, self._images.source, self._images.names, config.target
        )
        write_reconstructions(self._folder.reconstructions / weights.name, results, info)

    @cached_property
    def _images(self) -> InputImages:
        dataset = Dataset.open(run_dataset(self._recipe, self._folder))
        return dataset_images(dataset, min(_COUNT, len(dataset)), self._recipe)
