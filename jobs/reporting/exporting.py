"""Writes a run's weights for the reference's code, timm, or Hugging Face; the body of `maelstream export`.

The result is a folder with weights, the configuration that the library reads, and a model card. It is written under
another name and then renamed, so it is complete or absent. Position tables of pre-training are computed from the
configuration, in exact float32.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from maelstream.jobs.checkpointing.store import FILES
from maelstream.jobs.evaluation.results import RESULT, read_evaluations
from maelstream.jobs.recipe import ClassificationRecipe, Recipe
from maelstream.jobs.reporting.model_card import model_card
from maelstream.jobs.run_folder.data_paths import located
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.export_classifier import (
    CLASSIFIER_FORMATS,
    ExportedClassifier,
    fold_probe,
)
from maelstream.jobs.weights.export_formats import FORMATS, FormatCard, write_json
from maelstream.jobs.weights.export_names import EXPORT_NAME, Format
from maelstream.jobs.weights.reading import StoredWeights, check_shapes, mae_weights, read_weights
from maelstream.jobs.weights.tensor_files import report
from maelstream.model.classifier import build_classifier
from maelstream.model.formats import describe_model, without_decoder
from maelstream.model.mae import position_tables
from maelstream.pipeline.config import evaluation_margin
from maelstream.shards.dataset import Dataset
from maelstream.shards.durable import sync
from maelstream.shards.errors import MaelstreamError


@dataclass(frozen=True)
class Exported:
    """What an export writes: the files of a format, a line that describes the model, and the content of export.json."""

    write: Callable[[Path], FormatCard]
    description: str
    settings: dict[str, Any]


def exported_mae(folder: RunFolder, recipe: Recipe, step: int, format: Format, encoder_only: bool) -> Exported:
    """A masked autoencoder; MaelstreamError for damaged weights."""
    stored = read_weights(folder.checkpoints.at(step))
    weights = mae_weights(stored, recipe.model) | position_tables(recipe.model)
    if encoder_only or format == "timm":
        weights = without_decoder(weights)
    settings = {"model": asdict(recipe.model)}
    return Exported(lambda path: FORMATS[format](path, weights, recipe.model), describe_model(weights), settings)


def exported_classifier(
    folder: RunFolder, recipe: ClassificationRecipe, step: int, format: Format, ema: bool
) -> Exported:
    """A classifier; of several linear probes the best one. MaelstreamError for damaged weights or an unknown best."""
    file = folder.checkpoints.at(step) / FILES["ema" if ema else "weight"]
    if ema and not file.exists():
        raise MaelstreamError(f"{folder.path} keeps no moving average of its weights; leave out --ema")
    weights = read_weights(file).tensors
    if recipe.tuning.probe:
        weights = fold_probe(weights, best_probe(folder, recipe))
    config, data = recipe.model, recipe.data
    weights = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    with torch.device("meta"):
        expected = build_classifier(config).state_dict()
    check_shapes(StoredWeights(file, weights, config.grid), expected)
    classifier = ExportedClassifier(
        weights,
        config,
        data.mean,
        data.std,
        data.crop.margin or evaluation_margin(config.image_size),
        class_names(recipe, folder),
    )
    settings = {"classifier": asdict(config), "mean": data.mean, "std": data.std, "classes": classifier.labels}
    description = f"{describe_model(weights).removesuffix(', no decoder')}, {config.classes} classes"
    return Exported(lambda path: CLASSIFIER_FORMATS[format](path, classifier), description, settings)


def best_probe(folder: RunFolder, recipe: ClassificationRecipe) -> int | None:
    """The number of the best of several linear probes; None if there is one."""
    if len(recipe.tuning.lrs) < 2:
        return None
    if not (folder.path / RESULT).exists():
        raise MaelstreamError(
            f"{folder.path} trains {len(recipe.tuning.lrs)} linear probes and has no result yet, so the best one is "
            "unknown; train it to the end"
        )
    best = read_evaluations(folder.path)[0].settings["best"]
    return [f"lr {lr:g}" for lr in recipe.tuning.lrs].index(best)


def class_names(recipe: ClassificationRecipe, folder: RunFolder) -> tuple[str, ...]:
    """The names of the classes in the run's dataset; their numbers, with a note, if it cannot be read any more."""
    try:
        names = tuple(Dataset.open(located(folder, recipe.data.train) or recipe.data.train).classes)
    except MaelstreamError as error:
        report(f"the export has numbers instead of class names: {error}")
        names = ()
    return names if len(names) == recipe.model.classes else tuple(map(str, range(recipe.model.classes)))


def export(folder: RunFolder, step: int, format: Format, exported: Exported, out: Path) -> None:
    """Writes the checkpoint of `step` to `out`; replaces an older export there.

    Raises:
        MaelstreamError: a model that the format cannot represent, or a folder that cannot be written.
    """
    unfinished, replaced = out.with_name(out.name + ".writing"), out.with_name(out.name + ".replaced")
    try:
        for leftover in (unfinished, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished.mkdir(parents=True)
        card = exported.write(unfinished)
        write_json(unfinished / EXPORT_NAME, {"format": format, "step": step, **exported.settings})
        (unfinished / "README.md").write_text(model_card(folder, step, exported.description, card))
        for path in [*unfinished.iterdir(), unfinished]:
            sync(path)
        if out.exists():
            out.rename(replaced)
        unfinished.rename(out)
        sync(out.parent)
    except OSError as error:
        raise MaelstreamError(f"--out {out} cannot be written ({error.strerror}); choose another folder") from None
    finally:
        for leftover in (unfinished, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
