"""The objective of training on labels: what `finetune`, `linprobe`, `partial` and `scratch` share.

The four differ in their recipes: which parameters are trained, by which optimizer, with which augmentation (paper,
appendix A.1 and section 4.3). Mixup, CutMix and stochastic depth are functions of (seed, step, rank, micro-batch), so
a resumed run takes exactly the same steps.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maelstream.jobs.checkpointing.partition import partition_of
from maelstream.jobs.distributed.ranks import Ranks
from maelstream.jobs.evaluation.classifier_evaluator import ClassifierEvaluator
from maelstream.jobs.recipe import ClassificationRecipe
from maelstream.jobs.training.engine import Float32Classifier, adamw, engine_around, needs_widening
from maelstream.jobs.training.summary import Datasets
from maelstream.jobs.weights.reading import classifier_from_encoder, read_weights
from maelstream.model.classifier import FeatureNorm, build_classifier, make_linear_probe, train_last_blocks
from maelstream.model.optimise import LARS, Span, layer_decay_groups
from maelstream.model.patches import normalise
from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.erase import erase
from maelstream.pipeline.hashing import sample_keys, seed_word
from maelstream.pipeline.loader import ImageLoader
from maelstream.pipeline.mixup import apply_mixup
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.output import Output
from maelstream.pipeline.producer import Batch
from maelstream.pipeline.sample_source import BadSample
from maelstream.shards.dataset import Dataset


class Classification:
    """A classifier and labelled images; an `Objective` of jobs/training/trainer.py."""

    def __init__(self, recipe: ClassificationRecipe, train: Dataset, val: Dataset, ranks: Ranks):
        self.recipe, self._train, self._ranks = recipe, train, ranks
        self.datasets: Datasets = {"train": train, "val": val}
        self.evaluator = ClassifierEvaluator(recipe, len(train), val, ranks)

    def loader(
        self, batch_split: BatchSplit, rank: int, threads: int, on_bad: Callable[[BadSample], None]
    ) -> ImageLoader:
        recipe, data = self.recipe, self.recipe.data
        order = SampleOrder(len(self._train), recipe.seed, data.shuffle)
        return ImageLoader(
            self._train,
            order,
            AugmentSampler(recipe.seed, data.crop, recipe.model.image_size),
            batch_split,
            rank,
            replace(recipe.loader, threads=threads),
            Output(mean=data.mean, std=data.std, erase=False),
            on_bad,
        )

    def build_model(self, weights: dict[str, Tensor] | None) -> nn.Module:
        model = model_of(self.recipe, weights)
        self.evaluator.copy_model(model)
        return model

    def build_engine(self, model: Any, batch_split: BatchSplit) -> Any:
        matrices = [name for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1]
        engine = engine_around(self.recipe, batch_split, model, self._optimizer(model))
        self.evaluator.restore_buffers(engine)
        for norm in (module for module in engine.module.modules() if isinstance(module, FeatureNorm)):
            norm.sum_over_ranks = sum_over_ranks
        partition = partition_of(engine)
        if isinstance(partition.optimizer, LARS):  # it scales each whole matrix, of which this rank holds a part
            numbers = {name: number for number, name in enumerate(matrices)}
            spans: dict[Tensor, list[Span]] = {}
            for piece in (piece for piece in partition.pieces if piece.name in numbers):
                span = Span(piece.offset, piece.size, numbers[piece.name])
                spans.setdefault(partition.flats[piece.flat], []).append(span)
            partition.optimizer.set_partition(spans, len(numbers), sum_over_ranks)
        return engine

    def _optimizer(self, model: Any) -> torch.optim.Optimizer:
        recipe, tuning = self.recipe, self.recipe.tuning
        if tuning.lrs:
            heads = [model.head[1]] if len(tuning.lrs) == 1 else list(model.head[1])
            groups = [
                {"params": list(head.parameters()), "lr_scale": lr / recipe.optim.base_lr}
                for lr, head in zip(tuning.lrs, heads, strict=True)
            ]
        else:
            groups = layer_decay_groups(model, recipe.optim.weight_decay, tuning.layer_decay)
        if tuning.optimizer == "adamw":
            return adamw(recipe, groups)
        for group in groups:
            group["weight_decay"] = recipe.optim.weight_decay  # LARS does not apply it to vectors
        return LARS(groups, 0.0, momentum=tuning.momentum)

    def loss(self, engine: Any, step: int, images: Tensor, batch: Batch, micro_batch: int) -> Tensor:
        recipe, mixing = self.recipe, self.recipe.mixup
        part = self._ranks.rank * engine.gradient_accumulation_steps() + micro_batch  # index in the global batch
        key = sample_keys(seed_word(recipe.seed, "dropout"), np.array([step]), np.array([part]))
        torch.manual_seed(int(key[0]))  # stochastic depth draws from torch's own generator
        levels = normalise(images, recipe.data.mean, recipe.data.std)  # (B, 3, H, W)
        if batch.erasing is not None:
            erase(levels, batch.erasing, recipe.data.mean, recipe.data.std)
        labels = torch.from_numpy(batch.labels).long().to(engine.device, non_blocking=True)
        target: Tensor = labels
        if mixing.mixup or mixing.cutmix:
            levels, target = apply_mixup(levels, labels, batch.keys, recipe.model.classes, mixing)
        dtype = torch.float32 if recipe.engine.precision == "fp32" else torch.bfloat16
        logits = engine(levels.to(dtype)).float()  # (B, classes), or (heads, B, classes)
        smoothing = 0.0 if target is not labels else mixing.label_smoothing
        heads = logits if logits.ndim == 3 else logits[None]
        return torch.stack([F.cross_entropy(head, target, label_smoothing=smoothing) for head in heads]).sum()


def model_of(recipe: ClassificationRecipe, trained: dict[str, Tensor] | None) -> nn.Module:
    """The classifier with the `trained` weights of a checkpoint, on the encoder of `recipe.weights`, or untrained.

    Raises:
        WeightsError: the weights cannot be read, or their sizes differ from the recipe's.
    """
    if recipe.weights and trained is None:
        model = classifier_from_encoder(read_weights(Path(recipe.weights)), recipe.model, recipe.seed)
    else:
        model = build_classifier(recipe.model, recipe.seed, head_std=0.02)
    if needs_widening(recipe):
        model.__class__ = Float32Classifier
    if recipe.tuning.probe:
        make_linear_probe(model, recipe.seed, max(1, len(recipe.tuning.lrs)))
    elif recipe.tuning.blocks >= 0:
        train_last_blocks(model, recipe.tuning.blocks)
    model.set_grad_checkpointing(recipe.engine.activation_checkpointing)
    if trained is not None:
        model.load_state_dict(trained, strict=False)  # a checkpoint lacks the number of batches that a norm has seen
    return model


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Adds up `tensor` over all ranks, in place, and returns it."""
    torch.distributed.all_reduce(tensor)
    return tensor
