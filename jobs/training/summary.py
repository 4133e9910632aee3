"""What a run prints when it starts and when it ends: data, model, ranks, batch, steps, folder, next commands."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from maelstream.jobs.distributed.ranks import Ranks
from maelstream.jobs.format import format_duration
from maelstream.jobs.hardware import process_device
from maelstream.jobs.recipe import AnyRecipe, Recipe
from maelstream.jobs.training.schedule import Schedule
from maelstream.model.sizes import family_name
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.mix import Mix
from maelstream.pipeline.stream import Stream
from maelstream.shards.dataset import Dataset

Datasets = Mapping[str, Dataset | Mix | Stream]
"""The data of a run by what it is used for: `data`, or `train` and `val`."""


def start_summary(
    recipe: AnyRecipe,
    datasets: Datasets,
    model: nn.Module,
    ranks: Ranks,
    batch_split: BatchSplit,
    schedule: Schedule,
    step: int,
    last_step: int,
    folder: Path,
) -> str:
    """What is about to run, one fact per line; `step` is the step that the run resumes from, 0 at its first start."""
    engine = recipe.engine
    resumed = f", resuming from step {step:,}" if step else ""
    stopped = f", stopping at step {last_step:,}" if last_step < schedule.total_steps else ""
    facts = {
        **{name: _data(dataset) for name, dataset in datasets.items()},
        "model": _model(recipe, model),
        "ranks": f"{ranks.world_size:,}, {_devices(ranks)}; ZeRO {engine.zero}, {engine.precision}",
        "batch": _batch(batch_split),
        "steps": f"{schedule.total_steps:,}, {recipe.optim.epochs:g} epochs{resumed}{stopped}",
        "run": str(folder),
    }
    return "\n".join([f"maelstream {recipe.job}", *(f"  {name:<7}{fact}" for name, fact in facts.items())])


def end_summary(
    recipe: AnyRecipe, folder: Path, first: int, step: int, total: int, seconds: float, stopped_by: str
) -> str:
    """How a start of the run ended that took the steps after `first` up to `step`, and what to do next.

    `seconds` is the time of these steps, with evaluations and checkpoints; `stopped_by` says why a run ended before
    `total` steps.
    """
    rate = (step - first) * recipe.optim.batch_size / seconds
    took = f"{seconds:.0f} s" if seconds < 100 else format_duration(seconds)
    speed = f"{step - first:,} steps in {took}, {rate:,.0f} images/s" if step > first else "no step taken"
    if step < total:
        end = f"stopped by {stopped_by} at step {step:,} of {total:,}"
        return f"maelstream {recipe.job}: {end} ({speed}); {folder} resumes when the same command is started again"
    return f"maelstream {recipe.job}: finished {folder}: {speed}\n{next_commands(recipe, folder)}"


def already_there(recipe: AnyRecipe, folder: Path, step: int, total: int) -> str:
    """For a start with nothing to do: the run is finished, or is at --stop-at-step or beyond it."""
    if step < total:
        return (
            f"maelstream {recipe.job}: {folder} is at step {step:,} of {total:,}, so --stop-at-step leaves no step to "
            "take; give a later step, or leave the option out"
        )
    return (
        f"maelstream {recipe.job}: {folder} is finished already ({total:,} steps); nothing is left to train\n"
        f"{next_commands(recipe, folder)}"
    )


def next_commands(recipe: AnyRecipe, folder: Path) -> str:
    """The commands that use a finished run, one per line."""
    run = shlex.quote(str(folder))
    if isinstance(recipe, Recipe):
        commands = [f"reconstruct {run}", f"report {run}", f"knn {run} TRAIN VAL", f"finetune {run} TRAIN VAL"]
    else:
        commands = [f"report {run}", f"evaluate {run} VAL", f"export {run} --format timm"]
    return "\n".join(f"  {'next' if not number else '':<7}maelstream {each}" for number, each in enumerate(commands))


def _data(dataset: Dataset | Mix | Stream) -> str:
    if isinstance(dataset, Stream):
        count = len(dataset.shards)
        return f"{len(dataset):,} samples in {count:,} shard{'s' * (count != 1)} that are streamed, {dataset.folder}"
    if isinstance(dataset, Mix):
        return f"{len(dataset):,} samples in {len(dataset.datasets)} datasets, {dataset.folder}"
    classes = f"{len(dataset.classes):,} classes" if dataset.classes else "no labels"
    return f"{len(dataset):,} samples, {classes}, {dataset.folder}"


def _model(recipe: AnyRecipe, model: nn.Module) -> str:
    size = recipe.model
    parts = {id(part): part for part in model.parameters()}.values()
    counts = {part.requires_grad: 0 for part in parts}
    for part in parts:
        counts[part.requires_grad] += getattr(part, "ds_numel", part.numel())  # at ZeRO 3 a rank holds a part of it
    height, width = size.image_size
    frozen = f", {_count(counts[True])} of them trained" if False in counts else ""
    start = ""
    if not isinstance(recipe, Recipe) and recipe.weights:
        at = f" (step {recipe.weights_step:,})" if recipe.weights_step is not None else ""
        start = f", from {recipe.weights}{at}"
    name = f"{family_name(size.dim, size.depth)}/{size.patch_size}"
    kind = f"masked autoencoder, {name}" if isinstance(recipe, Recipe) else f"{name}, {recipe.model.classes:,} classes"
    return f"{kind}, {width} x {height} px, {_count(sum(counts.values()))} parameters{frozen}{start}"


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number:,}"


def _devices(ranks: Ranks) -> str:
    device = process_device()
    if device.type == "cpu":
        return f"CPU, {ranks.threads} thread{'s' * (ranks.threads != 1)} each"
    import torch

    return f"one {torch.cuda.get_device_name(device)} each"


def _batch(split: BatchSplit) -> str:
    smallest = split.batch_size // (split.world_size * split.micro_batches)
    images = f"{split.largest:,}" if smallest == split.largest else f"{smallest:,} or {split.largest:,}"
    return (
        f"{split.batch_size:,} images = {split.world_size:,} rank{'s' * (split.world_size != 1)} x {images} images per "
        f"micro-batch x {split.micro_batches:,} accumulated"
    )
