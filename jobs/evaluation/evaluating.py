"""Evaluates a trained classifier on a packed dataset; the body of `maelstream evaluate`."""

import sys
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from maelstream.jobs.checkpointing.store import FILES, CheckpointError
from maelstream.jobs.distributed.ranks import ControlGroup, process_group, ranks_from_environment
from maelstream.jobs.evaluation.classification import model_of
from maelstream.jobs.evaluation.classifier_evaluator import classifier_names
from maelstream.jobs.evaluation.classify import check_datasets
from maelstream.jobs.evaluation.options import EvaluationOptions
from maelstream.jobs.evaluation.results import Scores, record_scores
from maelstream.jobs.evaluation.scores import classify_with, scores
from maelstream.jobs.hardware import process_device
from maelstream.jobs.recipe import ClassificationRecipe, HealthConfig
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.reading import WeightsError, read_weights, stored_classifier
from maelstream.pipeline.eval_pass import Reading
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError


@dataclass(frozen=True)
class TrainedClassifiers:
    """Classifiers that take the same images: a run's weights, and their EMA where the run keeps one."""

    models: list[tuple[nn.Module, list[str]]]
    """Each model with the names of its heads."""
    classes: int
    image_size: tuple[int, int]
    """Height and width in pixels."""
    margin: float | None
    """The margin in the run's recipe, if it has one."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    step: int | None
    """The run's training step; None for a file."""


def evaluate(weights: str, dataset: Dataset, options: EvaluationOptions) -> None:
    """Evaluates the classifier `weights` on a dataset on all ranks; rank 0 records and prints the result.

    Raises:
        MaelstreamError: no readable classifier, no labels, or a dataset with another number of classes.
    """
    path = Path(weights)
    check_datasets(dataset, dataset)
    folder = RunFolder(path)
    recipe = folder.any_recipe() if folder.config.exists() else None
    if recipe is not None and not isinstance(recipe, ClassificationRecipe):
        raise WeightsError(
            f"{path} is a run of pretrain, which has no classifier; train one with `maelstream finetune`, or give "
            "it to `maelstream knn`"
        )
    ranks = ranks_from_environment()
    trained = classifier_of_file(path, options.heads) if recipe is None else None
    classes = trained.classes if trained is not None else recipe.model.classes if recipe is not None else 0
    if classes != len(dataset.classes):
        raise MaelstreamError(
            f"{path} distinguishes {classes} classes, {dataset.folder} has {len(dataset.classes)}; give images of the "
            "classes that it was trained on"
        )
    with process_group(ranks, 2 * HealthConfig().silent_s) as control_group:
        if recipe is not None:
            trained = classifiers_of_run(folder, recipe, control_group)
        assert trained is not None
        name = f"evaluate-{dataset.folder.rstrip('/').rpartition('/')[2]}"
        result_folder = options.result_folder(path, trained.step, name)
        reading = options.reading(trained.image_size, trained.margin, ranks)
        by_head = scores_by_head(trained, reading, dataset, control_group)
    if ranks.rank:
        return
    best = max(by_head, key=lambda head: by_head[head].top1)
    evaluation = record_scores(
        by_head[best],
        None if recipe is None else path,
        job="evaluate",
        name=name,
        weights=weights,
        train=recipe.data.train if recipe else "",
        val=dataset.folder,
        folder=result_folder,
        settings={
            "best": best,
            "all": {head: {"top1": each.top1, "top5": each.top5} for head, each in by_head.items()},
            "trained_step": trained.step,
            "margin": reading.crop.margin,
            "image_size": list(trained.image_size),
        },
        step=recipe.weights_step if recipe else None,
    )
    for head, each in by_head.items():
        print(f"{path}, {head}: top-1 {each.top1:.2f} %, top-5 {each.top5:.2f} % of {each.images:,} images")
    print(f"{evaluation.folder}/result.json")


def classifiers_of_run(
    folder: RunFolder, recipe: ClassificationRecipe, control_group: ControlGroup
) -> TrainedClassifiers:
    """Loads the newest good checkpoint of a run and changes no file; CheckpointError when there is none."""
    step, messages = folder.checkpoints.newest_good(control_group, aside=False)
    if not step:
        raise CheckpointError(f"{folder.path} has no checkpoint yet; wait for the run to write its first one")
    for message in messages if control_group.ranks.rank == 0 else ():
        print(f"maelstream evaluate: {message}", file=sys.stderr)
    models = []
    for kind, file in FILES.items():
        if (folder.checkpoints.at(step) / file).exists():
            model = model_of(recipe, folder.checkpoints.weights(step, kind))
            models.append((model, classifier_names(recipe, kind)))
    config, data = recipe.model, recipe.data
    return TrainedClassifiers(models, config.classes, config.image_size, data.crop.margin, data.mean, data.std, step)


def classifier_of_file(path: Path, heads: int | None) -> TrainedClassifiers:
    """Loads the classifier in a file; WeightsError for an encoder without a head, or for tensors of no ViT."""
    stored = read_weights(path)
    model, config, mean, std = stored_classifier(stored, heads)
    return TrainedClassifiers([(model, ["weights"])], config.classes, config.image_size, None, mean, std, None)


def scores_by_head(
    trained: TrainedClassifiers, reading: Reading, val: Dataset, control_group: ControlGroup
) -> dict[str, Scores]:
    """The scores of every head by its name; the same on every rank."""
    by_head = dict[str, Scores]()
    device = process_device(control_group.ranks.local_rank)
    for model, names in trained.models:
        model.to(device).eval().requires_grad_(False)
        head_scores = scores(classify_with(model, trained.mean, trained.std), val, reading, control_group)
        by_head |= dict(zip(names, head_scores, strict=True))
    return by_head
