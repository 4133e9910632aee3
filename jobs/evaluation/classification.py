"""Classification on frozen or trained encoders: what `finetune`, `linprobe`, `partial` and `scratch` share.

The four differ in their recipes: which parameters are trained, by which optimizer, on what the images are made
(paper, appendix A.1, tables 9 and 10, and section 4.3). The loop, the checkpoints and the data path are those of
pre-training (maelstream.jobs.training.trainer). Mixing and stochastic depth are functions of (seed, step, rank, micro-batch), so a run
that was stopped goes on exactly.
"""

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maelstream.jobs.checkpointing.partition import MEAN, Partition
from maelstream.jobs.distributed.ranks import ControlGroup, Ranks
from maelstream.jobs.evaluation.results import RESULT, Scores, read_evaluations, record_scores
from maelstream.jobs.evaluation.scores import classify_with, scores
from maelstream.jobs.recipe import ClassificationRecipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.training.engine import Float32Classifier, adamw, engine_around, needs_widening
from maelstream.jobs.training.trainer import Loss
from maelstream.jobs.weights.reading import classifier_from_encoder, read_weights
from maelstream.model.classifier import FeatureNorm, build_classifier, make_linear_probe, train_last_blocks
from maelstream.model.optimise import LARS, Span, layer_decay_groups
from maelstream.model.patches import normalise
from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.decode import Output
from maelstream.pipeline.eval_pass import Reading
from maelstream.pipeline.hashing import sample_keys, seed_word
from maelstream.pipeline.loader import Batch, ImageLoader
from maelstream.pipeline.mixup import mixed
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.sample_source import BadSample
from maelstream.shards.dataset import Dataset


def model_of(recipe: ClassificationRecipe, trained: dict[str, Tensor] | None) -> nn.Module:
    """The classifier with the weights of a checkpoint, or as it begins: on the encoder of `recipe.weights`, or fresh.

    Raises:
        WeightsError: weights that cannot be read, or of another size than the recipe.
    """
    if recipe.weights and trained is None:
        model = classifier_from_encoder(read_weights(Path(recipe.weights)), recipe.model, recipe.seed)
    else:
        model = build_classifier(recipe.model, recipe.seed)
    if needs_widening(recipe):
        model.__class__ = Float32Classifier
    if recipe.tuning.probe:
        make_linear_probe(model, recipe.seed, max(1, len(recipe.tuning.lrs)))
    elif recipe.tuning.blocks >= 0:
        train_last_blocks(model, recipe.tuning.blocks)
    model.set_grad_checkpointing(recipe.engine.activation_checkpointing)
    if trained is not None:
        model.load_state_dict(trained, strict=False)  # but for how many batches a norm has seen
    return model


class Classification:
    """The task: what `maelstream.jobs.training.trainer` asks of it."""

    def __init__(self, recipe: ClassificationRecipe, train: Dataset, val: Dataset, ranks: Ranks):
        self.command: str = recipe.job
        self.recipe, self.ema = recipe, recipe.tuning.ema
        self.samples, self.fingerprint = len(train), train.fingerprint
        self._train, self._val, self._ranks = train, val, ranks
        weights = Path(recipe.weights)
        self._pretraining = weights if recipe.weights and RunFolder(weights).config.exists() else None
        self._fixed: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}  # of the engine's model, which training moves
        self._measured: tuple[int, dict[str, Scores]] = (-1, {})

    def loader(
        self, batch_split: BatchSplit, rank: int, threads: int, on_bad: Callable[[BadSample], None]
    ) -> ImageLoader:
        recipe, data, size = self.recipe, self.recipe.data, self.recipe.model.image_size
        order = SampleOrder(len(self._train), recipe.seed, data.shuffle)
        return ImageLoader(
            self._train,
            order,
            AugmentSampler(recipe.seed, data.crop, size),
            size,
            batch_split,
            rank,
            threads,
            recipe.loader.prefetch,
            Output(mean=data.mean, std=data.std),
            recipe.loader.decode,
            recipe.loader.max_bad_share,
            on_bad,
        )

    def build(self, trained: dict[str, Tensor] | None) -> nn.Module:
        model = model_of(self.recipe, trained)
        learnt = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._fixed = {
            name: tensor.detach().cpu().clone()
            for name, tensor in model.state_dict().items()
            if name not in learnt and tensor.is_floating_point()
        }
        self._plain = copy.deepcopy(model).requires_grad_(False).eval()  # ZeRO takes the other one apart
        self._names = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        return model

    def engine(self, model: Any, batch_split: BatchSplit) -> Any:
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
            return engine_around(recipe, batch_split, model, adamw(recipe, groups))
        for group in groups:
            group["weight_decay"] = recipe.optim.weight_decay  # LARS itself leaves vectors alone
        return engine_around(recipe, batch_split, model, LARS(groups, 0.0, momentum=tuning.momentum))

    def joined(
        self, engine: Any, partition: Partition, control_group: ControlGroup, heartbeat: Callable[[], None]
    ) -> None:
        self._partition, self._control_group, self._heartbeat = partition, control_group, heartbeat
        if isinstance(partition.optimizer, LARS):
            numbers = {name: n for n, name in enumerate(n for n, shape in self._names.items() if len(shape) > 1)}
            spans: dict[Tensor, list[Span]] = {}
            for piece in (piece for piece in partition.pieces if piece.name in numbers):
                span = Span(piece.offset, piece.size, numbers[piece.name])
                spans.setdefault(partition.flats[piece.flat], []).append(span)
            partition.optimizer.cut(spans, len(numbers), summed)
        self._buffers = {name: buffer for name, buffer in engine.module.named_buffers() if name in self._fixed}
        for name, buffer in self._buffers.items():  # DeepSpeed made them bf16
            buffer.data = self._fixed[name].to(buffer.device, copy=True)
        for norm in (module for module in engine.module.modules() if isinstance(module, FeatureNorm)):
            norm.summed = summed
        self._plain.to(engine.device)

    def fixed(self) -> dict[str, Tensor]:
        return self._fixed | {name: buffer.cpu().clone() for name, buffer in self._buffers.items()}

    def loss(self, step: int) -> Loss:
        return partial(self._loss, step)

    def _loss(self, step: int, engine: Any, images: Tensor, batch: Batch, number: int) -> Tensor:
        recipe, mixing = self.recipe, self.recipe.mixup
        part = self._ranks.rank * engine.gradient_accumulation_steps() + number  # of the global batch
        key = sample_keys(seed_word(recipe.seed, "dropout"), np.array([step]), np.array([part]))
        torch.manual_seed(int(key[0]))  # for stochastic depth, which draws from torch's own generator
        levels = normalise(images, recipe.data.mean, recipe.data.std)  # (B, 3, H, W)
        labels = torch.from_numpy(batch.labels).long().to(engine.device, non_blocking=True)
        target: Tensor = labels
        if mixing.mixup or mixing.cutmix:
            levels, target = mixed(levels, labels, batch.keys, recipe.model.classes, mixing)
        dtype = torch.float32 if recipe.engine.precision == "fp32" else torch.bfloat16
        logits = engine(levels.to(dtype)).float()  # (B, classes), or (heads, B, classes)
        smoothing = 0.0 if target is not labels else mixing.label_smoothing
        heads = logits if logits.ndim == 3 else logits[None]
        return torch.stack([F.cross_entropy(head, target, label_smoothing=smoothing) for head in heads]).sum()

    def keep(self, folder: RunFolder) -> None:
        pass

    def due(self, step: int, total: int) -> bool:
        every = self.recipe.tuning.evaluate_every_epochs
        epochs = [each * self.recipe.optim.batch_size // self.samples for each in (step - 1, step)]
        return step == total or bool(every and epochs[1] // every > epochs[0] // every)

    def measure(self, step: int) -> dict[str, float]:
        found = self._scores(step)
        return {"top1": max(each.top1 for each in found.values()), "top5": max(s.top5 for s in found.values())}

    def published(self, step: int, total: int) -> None:
        pass

    def finished(self, folder: RunFolder) -> bool:
        told = self._pretraining is None or any(
            evaluation.folder == str(folder.path) for evaluation in read_evaluations(self._pretraining)
        )
        return told and (folder.path / RESULT).exists()

    def finish(self, folder: RunFolder, step: int) -> None:
        found = self._scores(step)
        best = max(found, key=lambda name: found[name].top1)
        if self._control_group.ranks.rank:
            return
        recipe = self.recipe
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

    def _scores(self, step: int) -> dict[str, Scores]:
        """Of the weights as the checkpoint of this step has them, of their mean, and of each probe, by name."""
        if self._measured[0] != step:
            found: dict[str, Scores] = {}
            for kind in self._partition.weights:
                weights = self._partition.whole(kind, self._names) | self.fixed()
                self._plain.load_state_dict(weights, strict=False)
                for name, each in zip(head_names(self.recipe, kind), self._score(), strict=True):
                    found[name] = each
            self._measured = step, found
        return self._measured[1]

    def _score(self) -> list[Scores]:
        recipe = self.recipe
        reading = Reading(
            recipe.model.image_size,
            recipe.data.crop.margin,
            2 * recipe.engine.micro_batch_size,  # there are no gradients
            recipe.loader.threads or self._ranks.threads,
            recipe.loader.prefetch,
            recipe.loader.decode,
        )
        classify = classify_with(self._plain, recipe.data.mean, recipe.data.std)

        def heard(images: Tensor) -> Tensor:
            self._heartbeat()
            return classify(images)

        return scores(heard, self._val, reading, self._control_group)


def head_names(recipe: ClassificationRecipe, kind: str) -> list[str]:
    """What a table calls the classifiers of weights of a `kind`: each probe, or the one."""
    if recipe.tuning.probe:
        return [f"lr {lr:g}" for lr in recipe.tuning.lrs or (recipe.optim.base_lr,)]
    return ["mean of the weights" if kind == MEAN else "weights"]


def summed(tensor: Tensor) -> Tensor:
    """Over ranks."""
    torch.distributed.all_reduce(tensor)
    return tensor
