"""The objective of pre-training: reconstruct the removed patches of each image (paper, section 3)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from maelstream.jobs.recipe import Recipe
from maelstream.jobs.training.data import loader_of, open_data
from maelstream.jobs.training.engine import build_engine, build_model
from maelstream.jobs.training.summary import Datasets
from maelstream.model.mae import MAE
from maelstream.model.targets import PCATarget, TokenTarget
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.loader import ImageLoader
from maelstream.pipeline.producer import Batch
from maelstream.pipeline.sample_source import BadSample


class Pretraining:
    """A masked autoencoder and the images of a recipe; an `Objective` of jobs/training/trainer.py."""

    evaluator = None

    def __init__(self, recipe: Recipe, target: PCATarget | TokenTarget | None, initial: dict[str, Tensor] | None):
        """`target` is what the model predicts instead of pixels; `initial` are parameters to start from, by name."""
        self.recipe, self._target, self._initial = recipe, target, initial
        self._dataset, self._order = open_data(recipe.data, recipe.seed)
        self.datasets: Datasets = {"data": self._dataset}
        self.dataset_size = len(self._dataset)

    def loader(
        self, batch_split: BatchSplit, rank: int, threads: int, on_bad: Callable[[BadSample], None]
    ) -> ImageLoader:
        return loader_of(self.recipe, self._dataset, self._order, batch_split, rank, threads, on_bad)

    def build_model(self, weights: dict[str, Tensor] | None) -> MAE:
        model = build_model(self.recipe, self._target)
        if (weights := weights or self._initial) is not None:
            model.load_state_dict(
                weights, strict=False
            )  # a checkpoint has no buffers, initial weights may lack a decoder
        return model

    def build_engine(self, model: MAE, batch_split: BatchSplit) -> Any:
        return build_engine(self.recipe, batch_split, model)

    def loss(self, engine: Any, step: int, images: Tensor, batch: Batch, micro_batch: int) -> Tensor:
        return reconstruction_loss(engine, images, batch)


def reconstruction_loss(engine: Any, images: Tensor, batch: Batch) -> Tensor:
    """Mean loss over the removed patches of a micro-batch, a scalar; each sample's key draws its mask."""
    return engine(images, batch.keys.to(engine.device, non_blocking=True))
