"""Reads weights from a run, a checkpoint, an export, a Hugging Face folder or a single file.

The result has the reference implementation's names, only finite values, and the shapes of the requested model. From a
`.pth` only tensors are read: code in it is never run.
"""

import argparse
import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from maelstream.jobs.checkpointing.store import MANIFEST
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.model.classifier import build_classifier, encoder_weights, fresh_parameters, make_linear_probe
from maelstream.model.config import ClassifierConfig, MAEConfig, Pool
from maelstream.model.formats import (
    Weights,
    describe_model,
    has_decoder,
    mismatches,
    nonfinite_names,
    square_grid,
    to_reference,
)
from maelstream.model.mae import MAE, position_tables
from maelstream.model.sizes import default_heads
from maelstream.shards.errors import MaelstreamError

EXPORT_NAME = "export.json"
"""A file in every folder that `maelstream export` writes: the format, the step and the model's configuration."""
ENCODER_SIZES = ("image_size", "patch_size", "in_chans", "dim", "depth", "heads", "mlp_ratio")
"""The fields of `MAEConfig` and `ClassifierConfig` that an encoder's weights determine."""
_FILE_NAMES = ("weights.safetensors", "model.safetensors", "pytorch_model.bin")
_MAX_NAMED = 3  # tensors that a message lists


class WeightsError(MaelstreamError):
    """Weights that cannot be read, or that do not fit the requested model."""


@dataclass(frozen=True)
class StoredWeights:
    """Weights as they were read from a file."""

    file: Path
    tensors: dict[str, Tensor]
    """By the reference's names, on the CPU, in the dtype of the file."""
    grid: tuple[int, int] | None
    """Rows and columns of patches in the position table; None without a configuration if the table is not square."""


def read_weights(path: Path) -> StoredWeights:
    """Reads the weights in `path`; for a run, those of its newest checkpoint.

    Raises:
        WeightsError: no weights at `path`, a checkpoint's file whose SHA-256 has changed, names that no MAE has, code
            in a `.pth`, or a tensor with a NaN or an infinity.
    """
    file = _file_of(path)
    _check_digest(file)
    config = _config_of(file)
    try:
        tensors = to_reference(_load(file))
    except ValueError as error:
        raise WeightsError(f"{file}: {error}") from None
    if "pos_embed" not in tensors:  # checkpoints of a run leave out constant tables
        if config is None:
            raise WeightsError(
                f"{file} has no position table, and no configuration is next to it; give the run's folder"
            )
        tensors = position_tables(config) | tensors
    if names := nonfinite_names(tensors):
        raise WeightsError(f"{file}: NaN or infinity in {_some(names, ', ')}; use weights of an earlier step")
    return StoredWeights(file, tensors, square_grid(tensors) if config is None else config.grid)


def encoder_values(stored: StoredWeights) -> dict[str, Any]:
    """Values of a classification recipe that follow from the encoder: its sizes, and the mean and std of the pixels."""
    config, tensors = _config_of(stored.file), stored.tensors
    if config is not None:
        sizes = {name: getattr(config, name) for name in ENCODER_SIZES}
        return {"model": sizes, "data": {"mean": config.mean, "std": config.std}}
    dim, in_chans, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    sizes = {"patch_size": patch_size, "in_chans": in_chans, "dim": dim, "depth": depth}
    sizes["heads"] = default_heads(dim, depth)
    if stored.grid is not None:
        sizes["image_size"] = tuple(patch_size * side for side in stored.grid)
    return {"model": sizes}


def mae_weights(stored: StoredWeights, config: MAEConfig) -> dict[str, Tensor]:
    """The state dict for `MAE(config).load_state_dict`.

    Raises:
        WeightsError: an encoder without a decoder, or a model of another size.
    """
    if not has_decoder(stored.tensors):
        raise WeightsError(
            f"{stored.file} holds an encoder alone ({describe_model(stored.tensors)}), as the published mae_pretrain_* "
            "do: it can be fine-tuned, but reconstruction needs a decoder; give a full checkpoint"
        )
    with torch.device("meta"):
        expected = MAE(config).state_dict()
    _check_shapes(stored, expected)
    return stored.tensors


def classifier_from_encoder(stored: StoredWeights, config: ClassifierConfig, seed: int = 0) -> VisionTransformer:
    """A classifier on the encoder of `stored`; its head, and the norm after mean pooling, are newly initialised.

    Raises:
        WeightsError: an encoder of another size, or a position table whose grid is unknown.
    """
    if stored.grid is None:
        raise WeightsError(
            f"{stored.file}: its position table has no square grid, and no configuration gives the rows and columns; "
            "give the run's folder, or an export of it"
        )
    model = build_classifier(config, seed)
    try:
        weights = encoder_weights(stored.tensors, config, stored.grid)
    except ValueError as error:  # the table does not have the grid of the configuration
        raise WeightsError(f"{stored.file}: {error}") from None
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in fresh_parameters(config)}
    _check_shapes(StoredWeights(stored.file, weights, stored.grid), expected)
    model.load_state_dict(weights, strict=False)
    return model


def classifier_values(
    stored: StoredWeights, heads: int | None, image_size: int | None
) -> tuple[dict[str, Any], tuple[float, ...], tuple[float, ...]]:
    """Sizes for a `ClassifierConfig` on the encoder of `stored`, and the mean and standard deviation of its pixels.

    `heads` overrides the number of attention heads; `image_size` overrides the side of the image in pixels.

    Raises:
        WeightsError: a position table that is not square, so that the image size is unknown.
    """
    values = encoder_values(stored)
    sizes = values["model"]
    if heads is not None:
        sizes["heads"] = heads
    if image_size is not None:
        sizes["image_size"] = (image_size, image_size)
    if "image_size" not in sizes:
        raise WeightsError(
            f"{stored.file}: its position table has no square grid; give the image size, or the run's folder"
        )
    pixels = values.get("data", {"mean": MAEConfig.mean, "std": MAEConfig.std})
    return sizes, pixels["mean"], pixels["std"]


def stored_classifier(
    stored: StoredWeights, heads: int | None
) -> tuple[VisionTransformer, ClassifierConfig, tuple[float, ...], tuple[float, ...]]:
    """The classifier in `stored`, with its configuration and the mean and standard deviation of its pixels.

    The sizes follow from the shapes of the tensors, except for the number of `heads`.

    Raises:
        WeightsError: an encoder without a classifier, or sizes that do not fit together.
    """
    probe = "head.1.weight" in stored.tensors  # after a BatchNorm
    head = stored.tensors.get("head.1.weight" if probe else "head.weight")
    if head is None or head.ndim != 2:
        raise WeightsError(
            f"{stored.file} holds {describe_model(stored.tensors)} without a classifier; train one with `maelstream "
            "finetune`, or give it to `maelstream knn`"
        )
    sizes, mean, std = classifier_values(stored, heads, None)
    pool: Pool = "mean" if "fc_norm.weight" in stored.tensors else "class_token"
    try:
        config = ClassifierConfig(**sizes, classes=len(head), pool=pool, drop_path=0.0)
    except ValueError as error:
        raise WeightsError(f"{stored.file}: {error}; give --heads") from None
    model = build_classifier(config)
    if probe:
        make_linear_probe(model)
    expected = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    weights = {name: tensor for name, tensor in stored.tensors.items() if tensor.is_floating_point()}
    _check_shapes(StoredWeights(stored.file, weights, stored.grid), expected)
    model.load_state_dict(weights, strict=False)  # the file may lack a BatchNorm's count of batches
    return model, config, mean, std


def _check_shapes(stored: StoredWeights, expected: Weights) -> None:
    if phrases := mismatches(stored.tensors, expected):
        raise WeightsError(
            f"{stored.file} looks like {describe_model(stored.tensors)}, and the model is {describe_model(expected)}: "
            f"{_some(phrases, '; ')}"
        )


def _some(phrases: list[str], separator: str) -> str:
    more = f" and {len(phrases) - _MAX_NAMED} more" if len(phrases) > _MAX_NAMED else ""
    return separator.join(phrases[:_MAX_NAMED]) + more


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    if (folder := RunFolder(path)).config.exists():
        path = folder.checkpoints.at(folder.last_step())
    for name in _FILE_NAMES:
        if (path / name).exists():
            return path / name
    raise WeightsError(
        f"{path} holds no weights: it is not a run, and has none of {', '.join(_FILE_NAMES)}; give a run or a file"
    )


def _check_digest(file: Path) -> None:
    """Raises WeightsError if a checkpoint's file differs from its manifest; without a manifest, checks nothing."""
    store = RunFolder(file.resolve().parent.parent.parent).checkpoints
    step = store.step_of(file)
    if step is None or not (store.at(step) / MANIFEST).exists():
        return
    if fault := store.fault(step, only=file.name):
        raise WeightsError(f"{store.at(step)}: {fault}; give another checkpoint's folder")


def _config_of(file: Path) -> MAEConfig | None:
    """The model's configuration, if `file` is part of a run or an export."""
    if (export := file.parent / EXPORT_NAME).exists():
        try:
            return TypeAdapter(MAEConfig).validate_python(json.loads(export.read_text())["model"])
        except (ValueError, LookupError, TypeError):
            raise WeightsError(f"{export} is damaged, or of another version; export the run again") from None
    checkpoints = file.resolve().parent.parent
    folder = RunFolder(checkpoints.parent)
    is_of_run = checkpoints == folder.checkpoints.folder and folder.config.exists()
    return folder.recipe().model if is_of_run else None


def _load(file: Path) -> dict[str, Tensor]:
    """Reads every tensor of a file, under the file's own names."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Training checkpoints of the reference also hold their command line, which is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error.strerror or 'not found'}); give a run or a file") from None
    except pickle.UnpicklingError as error:
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise WeightsError(
                f"{file} holds code ({code[1]}) next to its tensors, which is never run; "
                "ask its author for a file of tensors"
            ) from None
        raise WeightsError(f"{file} is not a file of weights that torch can read as plain tensors") from None
    except (SafetensorError, RuntimeError, EOFError, LookupError, ValueError):
        raise WeightsError(f"{file} is truncated or is not a file of weights; fetch it again") from None
    for key in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise WeightsError(
            f"{file} holds a {type(found).__name__} instead of a dict of tensors; give a file of weights"
        )
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
