"""`maelstream evaluate WEIGHTS VAL`: top-1 and top-5 of a trained classifier on every image of a packed dataset.

WEIGHTS is a run of finetune, linprobe, partial or scratch, finished or not, whose newest good checkpoint is measured,
or a file of a fine-tuned ViT under timm's and the reference's names, whose sizes are read off its tensors.
"""

import maelstream.jobs.distributed.parent_death  # noqa: F401  before anything slow is imported

# isort: split
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import nn

from maelstream.jobs.arguments import parsed
from maelstream.jobs.checkpointing.store import FILES, CheckpointError
from maelstream.jobs.command import run
from maelstream.jobs.distributed.ranks import ControlGroup, process_group, ranks_from_environment
from maelstream.jobs.evaluation.classification import head_names, model_of
from maelstream.jobs.evaluation.classify import check_datasets
from maelstream.jobs.evaluation.options import Measuring
from maelstream.jobs.evaluation.results import Evaluation, record
from maelstream.jobs.evaluation.scores import Scores, classify_with, scores
from maelstream.jobs.recipe import ClassificationRecipe, HealthConfig
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.reading import WeightsError, classifier_of, read_weights
from maelstream.pipeline.eval_pass import Reading
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError


@dataclass(frozen=True)
class Evaluate(Measuring):
    """Measure a trained classifier on every image of a packed dataset."""

    weights: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WEIGHTS")]
    """A run of finetune, linprobe, partial or scratch, or a file of a classifier's weights."""
    val: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAL")]
    """A packed dataset with labels, of the classes that the classifier was trained on, in their order."""


@dataclass(frozen=True)
class Trained:
    """Classifiers of the same images: a run's weights, and their mean where it keeps one."""

    models: list[tuple[nn.Module, list[str]]]
    """Each with the names of its heads."""
    classes: int
    image_size: tuple[int, int]
    margin: float | None
    """Of the run; None for a file, which tells of none."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    step: int | None
    """Of the run."""


def trained_of_run(folder: RunFolder, recipe: ClassificationRecipe, control_group: ControlGroup) -> Trained:
    """Of the newest good checkpoint, which is left as it is; CheckpointError when there is none."""
    step, told = folder.checkpoints.newest_good(control_group, put_aside=False)
    if not step:
        raise CheckpointError(f"{folder.path} has no checkpoint yet; let the run reach its first one")
    for line in told if control_group.ranks.rank == 0 else ():
        print(f"maelstream evaluate: {line}", file=sys.stderr)
    models = []
    for kind, file in FILES.items():
        if (folder.checkpoints.at(step) / file).exists():
            model = model_of(recipe, folder.checkpoints.weights(step, kind))
            models.append((model, head_names(recipe, kind)))
    config, data = recipe.model, recipe.data
    return Trained(models, config.classes, config.image_size, data.crop.margin, data.mean, data.std, step)


def trained_of_file(path: Path, heads: int | None) -> Trained:
    """WeightsError for an encoder alone, and for tensors that are of no ViT."""
    stored = read_weights(path)
    model, config, mean, std = classifier_of(stored, heads)
    size = config.image_size
    return Trained([(model, ["weights"])], config.classes, size, None, mean, std, None)


def measured(trained: Trained, reading: Reading, val: Dataset, control_group: ControlGroup) -> dict[str, Scores]:
    """Scores of each head by its name."""
    found = dict[str, Scores]()
    device = torch.device("cuda", control_group.ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    for model, names in trained.models:
        model.to(device).eval().requires_grad_(False)
        of_heads = scores(classify_with(model, trained.mean, trained.std), val, reading, control_group)
        found |= dict(zip(names, of_heads, strict=True))
    return found


def main(args: list[str]) -> int:
    """`maelstream evaluate`; 0 when the result is written."""
    command = parsed(Evaluate, args, "evaluate")
    val, weights = Dataset.open(command.val), Path(command.weights)
    check_datasets(val, val)
    folder = RunFolder(weights)
    recipe = folder.any_recipe() if folder.config.exists() else None
    if recipe is not None and not isinstance(recipe, ClassificationRecipe):
        raise WeightsError(
            f"{weights} is a run of pretrain, which has no classifier; train one with `maelstream finetune`, or give "
            "it to `maelstream knn`"
        )
    ranks = ranks_from_environment()
    trained = trained_of_file(weights, command.heads) if recipe is None else None
    classes = trained.classes if trained is not None else recipe.model.classes if recipe is not None else 0
    if classes != len(val.classes):
        raise MaelstreamError(
            f"{weights} tells {classes} classes apart, {val.folder} has {len(val.classes)}; give images of the classes "
            "that it was trained on"
        )
    with process_group(ranks, 2 * HealthConfig().silent_s) as control_group:
        if recipe is not None:
            trained = trained_of_run(folder, recipe, control_group)
        assert trained is not None
        reading = command.reading(trained.image_size, trained.margin, ranks)
        found = measured(trained, reading, val, control_group)
    if ranks.rank:
        return 0
    best = max(found, key=lambda name: found[name].top1)
    result = found[best]
    for text in result.undecodable:
        print(f"maelstream evaluate: counted as wrong: {text}", file=sys.stderr)
    name = f"evaluate-{val.folder.rstrip('/').rpartition('/')[2]}"
    evaluation = Evaluation(
        job="evaluate",
        name=name,
        top1=result.top1,
        top5=result.top5,
        images=result.images,
        epochs=None,
        step=recipe.weights_step if recipe else None,
        weights=command.weights,
        train=recipe.data.train if recipe else "",
        val=command.val,
        folder=str(command.result_folder(weights, trained.step, name)),
        settings={
            "best": best,
            "all": {head: {"top1": of_head.top1, "top5": of_head.top5} for head, of_head in found.items()},
            "trained_step": trained.step,
            "margin": reading.margin,
            "image_size": list(trained.image_size),
            "undecodable": list(result.undecodable),
        },
        finished=time.time(),
    )
    record(evaluation, None if recipe is None else weights)
    for head, of_head in found.items():
        print(f"{weights}, {head}: top-1 {of_head.top1:.2f} %, top-5 {of_head.top5:.2f} % of {of_head.images:,} images")
    print(f"{evaluation.folder}/result.json")
    return 0


if __name__ == "__main__":
    sys.exit(run("evaluate", sys.argv[1:]))
