"""Scores of a classifier during and after its training, on every image of the validation set."""

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from maelstream.jobs.checkpointing.partition import EMA, Partition
from maelstream.jobs.distributed.ranks import ControlGroup, Ranks
from maelstream.jobs.evaluation.results import RESULT, Scores, read_evaluations, record_scores
from maelstream.jobs.evaluation.scores import classify_with, scores
from maelstream.jobs.recipe import ClassificationRecipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.pipeline.eval_pass import Reading
from maelstream.shards.dataset import Dataset


class ClassifierEvaluator:
    """Scores a run's weights, their EMA and each linear probe; an `Evaluator` of jobs/training/trainer.py."""

    def __init__(self, recipe: ClassificationRecipe, train_size: int, val: Dataset, ranks: Ranks):
        self._recipe, self._train_size, self._val, self._ranks = recipe, train_size, val, ranks
        weights = Path(recipe.weights)
        self._pretraining = weights if recipe.weights and RunFolder(weights).config.exists() else None
        self._frozen: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}  # those of the engine's model, which training updates
        self._latest: tuple[int, dict[str, Scores]] = (-1, {})

    def copy_model(self, model: nn.Module) -> None:
        """Keeps a copy of `model` to score with, and its frozen tensors; ZeRO partitions the model itself."""
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        self._frozen = {
            name: tensor.detach().cpu().clone()
            for name, tensor in model.state_dict().items()
            if name not in self._shapes and tensor.is_floating_point()
        }
        self._model = copy.deepcopy(model).requires_grad_(False).eval()

    def restore_buffers(self, engine: Any) -> None:
        """Makes the buffers of the engine's model float32 again; DeepSpeed casts them to bf16."""
        self._buffers = {name: buffer for name, buffer in engine.module.named_buffers() if name in self._frozen}
        for name, buffer in self._buffers.items():
            buffer.data = self._frozen[name].to(buffer.device, copy=True)
        self._model.to(engine.device)

    def frozen_tensors(self) -> dict[str, Tensor]:
        return self._frozen | {name: buffer.cpu().clone() for name, buffer in self._buffers.items()}

    def start(self, partition: Partition, control_group: ControlGroup, heartbeat: Callable[[], None]) -> None:
        self._partition, self._control_group, self._heartbeat = partition, control_group, heartbeat

    def is_due(self, step: int, total_steps: int) -> bool:
        every = self._recipe.tuning.evaluate_every_epochs
        epochs = [number * self._recipe.optim.batch_size // self._train_size for number in (step - 1, step)]
        return step == total_steps or bool(every and epochs[1] // every > epochs[0] // every)

    def evaluate(self, step: int) -> dict[str, float]:
        found = self._scores_at(step).values()
        return {"top1": max(each.top1 for each in found), "top5": max(each.top5 for each in found)}

    def has_result(self, folder: RunFolder) -> bool:
        is_listed = self._pretraining is None or any(
            evaluation.folder == str(folder.path) for evaluation in read_evaluations(self._pretraining)
        )
        return is_listed and (folder.path / RESULT).exists()

    def record_result(self, folder: RunFolder, step: int) -> None:
        found = self._scores_at(step)
        best = max(found, key=lambda name: found[name].top1)
        if self._control_group.ranks.rank:
            return
        recipe = self._recipe
        settings = {
            "lr": recipe.optim.base_lr,
            "batch_size": recipe.optim.batch_size,
            "blocks": recipe.tuning.blocks,
            "pool": recipe.model.pool,
            "image_size": list(recipe.model.image_size),
            "seed": recipe.seed,
            "best": best,
            "all": {name: {"top1": each.top1, "top5": each.top5} for name, each in found.items()},
        }
        evaluation = record_scores(
            found[best],
            self._pretraining,
            job=recipe.job,
            name=folder.path.name,
            weights=recipe.weights,
            train=recipe.data.train,
            val=recipe.data.val,
            folder=folder.path,
            settings=settings,
            step=recipe.weights_step,
            epochs=recipe.optim.epochs,
        )
        print(f"maelstream {recipe.job}: top-1 {evaluation.top1:.2f} %, top-5 {evaluation.top5:.2f} % ({best})")
        sys.stdout.flush()

    def _scores_at(self, step: int) -> dict[str, Scores]:
        """Scores by name of the weights that the checkpoint of `step` holds: trained weights, EMA, each probe."""
        if self._latest[0] != step:
            found: dict[str, Scores] = {}
            for kind in self._partition.weights:
                weights = self._partition.whole(kind, self._shapes) | self.frozen_tensors()
                self._model.load_state_dict(weights, strict=False)
                found |= zip(classifier_names(self._recipe, kind), self._score(), strict=True)
            self._latest = step, found
        return self._latest[1]

    def _score(self) -> list[Scores]:
        recipe = self._recipe
        reading = Reading(
            recipe.model.image_size,
            recipe.data.crop.margin,
            2 * recipe.engine.micro_batch_size,  # there are no gradients
            replace(recipe.loader, threads=recipe.loader.threads or self._ranks.threads),
        )
        classify = classify_with(self._model, recipe.data.mean, recipe.data.std)

        def classify_with_heartbeat(images: Tensor) -> Tensor:
            self._heartbeat()
            return classify(images)

        return scores(classify_with_heartbeat, self._val, reading, self._control_group)


def classifier_names(recipe: ClassificationRecipe, kind: str) -> list[str]:
    """Names in a table of the classifiers that weights of a `kind` hold: one for each probe, or a single one."""
    if recipe.tuning.probe:
        return [f"lr {lr:g}" for lr in recipe.tuning.lrs or (recipe.optim.base_lr,)]
    return ["EMA of the weights" if kind == EMA else "weights"]
