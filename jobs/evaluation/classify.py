"""The command line of `finetune`, `linprobe`, `partial` and `scratch`, and how their recipe is put together.

The encoder's sizes come from its weights and the number of classes from the data. The rest comes from the recipe: the
paper's for ViT-B, L and H, or the command's own for any other size. Sizes in the recipe must fit the weights. torch,
DALI and DeepSpeed take seconds to import, so they are imported once options and datasets are checked.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from maelstream.jobs.arguments import asks_for_help, option_value, parse_arguments
from maelstream.jobs.recipe import (
    RECIPES,
    ClassificationRecipe,
    Job,
    Recipe,
    RecipeError,
    check_kind,
    dump_recipe,
    merged_values,
    read_values,
    resolve_as,
)
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.training.run_options import RunOptions
from maelstream.model.config import ENCODER_SIZES, ClassifierConfig, MAEConfig
from maelstream.model.sizes import paper_name
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError
from maelstream.shards.labels import first_difference


@dataclass(frozen=True, kw_only=True)
class ClassificationOptions(RunOptions):
    """Options that the four commands share."""

    recipe: Annotated[ClassificationRecipe, tyro.conf.arg(name="")]
    recipe_file: Annotated[Path | None, tyro.conf.arg(name="recipe", aliases=["--recipe-file"])] = None
    """The name or the YAML file of a recipe; by default the paper's for the encoder's size, or the command's own for
    any other size."""


@dataclass(frozen=True)
class Scratch(ClassificationOptions):
    """Train a classifier without pre-training, or resume the run in --run."""

    train: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TRAIN")]
    """A packed dataset with labels."""
    val: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAL")]
    """A packed dataset of the same classes; every image of it is scored."""


@dataclass(frozen=True)
class Classify(ClassificationOptions):
    """Train a classifier on pre-trained weights, or resume the run in --run."""

    weights: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WEIGHTS")]
    """A run's folder, for its newest checkpoint, or a file or folder of weights."""
    train: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TRAIN")]
    """A packed dataset with labels."""
    val: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAL")]
    """A packed dataset of the same classes; every image of it is scored."""


def recipe_of(
    job: Job, weights: str, train: Dataset, val: Dataset, file: Path | None, folder: RunFolder
) -> ClassificationRecipe:
    """The recipe before the options of the command line change it.

    Raises:
        MaelstreamError: the weights cannot be read, or the recipe is invalid or of another command.
    """
    from maelstream.jobs.weights.reading import WeightsError, encoder_values, read_weights

    fixed: dict[str, Any] = {"data": {"train": train.folder, "val": val.folder}, "weights": weights, "job": job}
    started = folder.any_recipe() if folder.config.exists() and folder.checkpoints.steps() else None
    if isinstance(started, ClassificationRecipe) and started.weights == weights:  # the weights may be gone by now
        fixed["weights_step"] = started.weights_step
        encoder = _encoder_values(started.model, started.data.mean, started.data.std)
    elif weights:
        stored = read_weights(Path(weights))
        heads = [tensor for name, tensor in stored.tensors.items() if re.match(r"head\..*weight$", name)]
        if heads:
            raise WeightsError(
                f"{stored.file} holds a classifier of {len(heads[0])} classes, {train.folder} has "
                f"{len(train.classes)}: training starts from an encoder; `maelstream evaluate` scores classifiers"
            )
        encoder = encoder_values(stored)
        run = RunFolder(Path(weights))
        fixed["weights_step"] = run.last_step() if run.config.exists() else None
    else:
        encoder = {}
    return _recipe_for(job, encoder, train, file, fixed)


def check_options(job: Job, options: Sequence[str], pretrained: Recipe, train: Dataset, val: Dataset) -> None:
    """Checks `options` of the command `job` for weights that `pretrained` will train, before they exist.

    Raises:
        MaelstreamError: what the command itself would raise for its options, its recipe or the datasets.
    """
    check_datasets(train, val)
    encoder = _encoder_values(pretrained.model, pretrained.model.mean, pretrained.model.std)
    recipe = _recipe_for(job, encoder, train, _recipe_option([*options]), {"job": job})
    default = ClassificationOptions(recipe=recipe, run=Path("RUN"))
    check_recipe(parse_arguments(ClassificationOptions, [*options], job, default).recipe, train)


def _encoder_values(model: MAEConfig | ClassifierConfig, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """Values of a classification recipe that follow from the encoder's configuration."""
    return {"model": {name: getattr(model, name) for name in ENCODER_SIZES}, "data": {"mean": mean, "std": std}}


def _recipe_option(args: list[str]) -> Path | None:
    file = option_value(args, "--recipe") or option_value(args, "--recipe-file")
    return Path(file) if file else None


def _recipe_for(
    job: Job, encoder: dict[str, Any], train: Dataset, file: Path | None, fixed: dict[str, Any]
) -> ClassificationRecipe:
    """The recipe in `file`, or the job's own, laid over the values of the encoder; `fixed` values replace both."""
    if file is None:
        size = encoder.get("model", {})
        file = default_recipe(job, paper_name(size.get("dim", 0), size.get("depth", 0)))
    values = read_values(file)
    check_kind(values, ClassificationRecipe, str(file))
    if (other := values.get("job", job)) != job and (job, other) != ("partial", "finetune"):
        raise RecipeError(f"{file} is a recipe of {other}; give {job} a recipe whose base is {default_recipe(job)}")
    classes = {"model": {"classes": max(1, len(train.classes))}}
    return resolve_as(
        ClassificationRecipe, merged_values(merged_values(merged_values(encoder, classes), values), fixed), str(file)
    )


def default_recipe(job: Job, encoder: str | None = None) -> Path:
    """The recipe of the paper for an encoder such as `vit_b16`; without one, the base of the job's recipes."""
    return RECIPES / ("finetune" if job == "partial" else job) / f"{encoder or 'base'}.yaml"


def check_datasets(train: Dataset, val: Dataset) -> None:
    """Raises a MaelstreamError for data on which no classifier can be trained or scored."""
    for dataset in (train, val):
        if not len(dataset):
            raise MaelstreamError(f"{dataset.folder} holds no images; pack some")
        if not dataset.classes:
            raise MaelstreamError(f"{dataset.folder} has no labels; pack class folders or another source with labels")
    if difference := first_difference(train.classes, val.classes):
        raise MaelstreamError(
            f"{train.folder} has {len(train.classes)} classes, {val.folder} has {len(val.classes)}, and they differ: "
            f"{difference}; pack both from folders of the same names, or with the same --classes"
        )
    if len(train.classes) > len(train):
        raise MaelstreamError(
            f"{train.folder} has {len(train.classes)} classes and {len(train)} images; each class needs at least one"
        )


def check_recipe(recipe: ClassificationRecipe, train: Dataset) -> None:
    """Raises a RecipeError for values that contradict each other or the data."""
    tuning = recipe.tuning
    if recipe.model.classes != len(train.classes):
        raise RecipeError(f"model.classes {recipe.model.classes}: {train.folder} has {len(train.classes)} classes")
    if recipe.job == "partial" and tuning.blocks < 0:
        raise RecipeError("partial needs --blocks: how many of the last blocks to train; 0.5 is the MLP of the last")
    if tuning.blocks > recipe.model.depth:
        raise RecipeError(f"tuning.blocks {tuning.blocks:g}: the encoder has {recipe.model.depth} blocks")
    if tuning.probe != (recipe.job == "linprobe"):
        raise RecipeError(f"tuning.probe {tuning.probe}: linprobe needs true, and {recipe.job} needs false")
    if tuning.probe and recipe.model.drop_path:
        raise RecipeError(f"model.drop_path {recipe.model.drop_path}: a linear probe needs exact features; set it to 0")
    if len(tuning.lrs) > 1 and recipe.optim.clip_grad:
        raise RecipeError("optim.clip_grad clips the gradients of all tuning.lrs together; give one lr, or set it to 0")
    if tuning.optimizer == "lars" and recipe.engine.offload_optimizer:
        raise RecipeError("engine.offload_optimizer: LARS has little state to offload; remove this option")


def classify(job: Job, args: list[str]) -> int:
    """Runs the command `job`; returns 0 when the run reached its end or --stop-at-step."""
    schema: Any
    schema, names = (Scratch, ["TRAIN", "VAL"]) if job == "scratch" else (Classify, ["WEIGHTS", "TRAIN", "VAL"])
    positionals = [tyro.MISSING] * len(names)
    given = args[: len(names)]
    if asks_for_help(args):
        base = default_recipe(job)
        recipe = resolve_as(ClassificationRecipe, read_values(base) | {"job": job}, str(base))
        default: Any = schema(*positionals, recipe=recipe, run=Path(f"runs/{job}-NAME"))
    else:
        if len(given) < len(names) or any(arg.startswith("-") for arg in given):
            raise RecipeError(f"{' '.join(names)} come first: `maelstream {job} {' '.join(names)} --run DIR ...`")
        weights = "" if job == "scratch" else given[0]
        train_set, val_set = (Dataset.open(folder) for folder in given[-2:])
        check_datasets(train_set, val_set)
        run = Path(option_value(args, "--run") or f"runs/{job}-{Path(weights or given[-2]).name}")
        recipe = recipe_of(job, weights, train_set, val_set, _recipe_option(args), RunFolder(run))
        default = schema(*positionals, recipe=recipe, run=run)
    command = parse_arguments(schema, args, job, default)
    recipe = command.recipe
    check_recipe(recipe, train_set)
    if command.print_config:
        print(dump_recipe(recipe), end="")
        return 0
    from maelstream.jobs.distributed.ranks import ranks_from_environment
    from maelstream.jobs.evaluation.classification import Classification
    from maelstream.jobs.training.trainer import train

    folder, ranks = RunFolder(command.run), ranks_from_environment()
    folder.check_same_experiment(recipe, command.allow)
    return train(Classification(recipe, train_set, val_set, ranks), folder, command.stop_at_step, ranks)
