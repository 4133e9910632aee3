"""Reads weights from a run, a checkpoint, an export, a Hugging Face folder or a single file.

The result has the reference implementation's names, only finite values, and the shapes of the requested model. From a
`.pth` only tensors are read: code in it is never run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from maelstream.jobs.checkpointing.store import MANIFEST, STATE, CheckpointStore, checkpoint_fault
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.configuration import known_values, spellings
from maelstream.jobs.weights.errors import WeightsError
from maelstream.jobs.weights.tensor_files import FOLDER_NAMES, read_file, report
from maelstream.model.classifier import build_classifier, encoder_weights, fresh_parameters, make_linear_probe
from maelstream.model.config import ENCODER_SIZES, ClassifierConfig, MAEConfig, Pool
from maelstream.model.formats import (
    Weights,
    describe_model,
    encoder_shape,
    has_decoder,
    mismatches,
    nonfinite_names,
    square_grid,
    to_reference,
    unwrapped,
)
from maelstream.model.mae import MAE, position_tables
from maelstream.model.sizes import default_heads

__all__ = [
    "StoredWeights",
    "WeightsError",
    "check_has_decoder",
    "check_known",
    "check_shapes",
    "classifier_from_encoder",
    "classifier_values",
    "encoder_values",
    "mae_weights",
    "read_weights",
    "stored_classifier",
    "weights_file",
]
_MAX_NAMED = 3  # tensors that a message lists


@dataclass(frozen=True)
class StoredWeights:
    """Weights as they were read from a file."""

    file: Path
    tensors: dict[str, Tensor]
    """By the reference's names, on the CPU, in the dtype of the file."""
    grid: tuple[int, int] | None
    """Rows and columns of patches in the position table; None without a configuration if the table is not square."""
    known: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `MAEConfig`, and `pool`, from a configuration next to the file (jobs/weights/configuration.py)."""


def read_weights(path: str | Path) -> StoredWeights:
    """Reads the weights in `path`; for a run, those of its newest checkpoint.

    A note on stderr says which weights are read if a file holds several, and which tensors are left out.

    Raises:
        WeightsError: no weights at `path`, a checkpoint's file whose SHA-256 has changed, names that no MAE has, code
            in a `.pth`, a configuration of a model of another kind, or a tensor with a NaN or an infinity.
    """
    file = weights_file(Path(path))
    _check_digest(file)
    known, content = known_values(file), read_file(file)
    try:
        tensors, dropped = unwrapped(content.tensors)
        tensors = to_reference(tensors)
        if "norm_pix_loss" in content.arguments:
            known = {"target": "normalised_pixel" if content.arguments["norm_pix_loss"] else "pixel"} | known
        if "pos_embed" not in tensors:  # checkpoints of a run leave out constant tables
            if "decoder_depth" not in known:
                raise WeightsError(
                    f"{file} has no position table, and no configuration is next to it; give the run's folder"
                )
            tensors = position_tables(_mae_config(known)) | tensors
        if "decoder_depth" not in known:  # of a run: there the caller names the tensors that differ
            _check_sizes(tensors, known)
    except ValueError as error:
        raise WeightsError(f"{file}: {error}") from None
    if dropped:
        report(f"{file}: left out, because no encoder or decoder has them: {_some(dropped, ', ')}")
    if names := nonfinite_names(tensors):
        raise WeightsError(f"{file}: NaN or infinity in {_some(names, ', ')}; use weights of an earlier step")
    return StoredWeights(file, tensors, _grid(tensors, known), known)


def encoder_values(stored: StoredWeights) -> dict[str, Any]:
    """Values of a classification recipe that follow from the encoder: its sizes, and the mean and std of the pixels."""
    shape, known = encoder_shape(stored.tensors), stored.known
    sizes = shape | {name: known[name] for name in ENCODER_SIZES if name in known}
    sizes.setdefault("heads", default_heads(sizes["dim"], sizes["depth"]))
    if stored.grid is not None:
        sizes.setdefault("image_size", tuple(sizes["patch_size"] * side for side in stored.grid))
    pixels = {name: known[name] for name in ("mean", "std") if name in known}
    return {"model": sizes} | ({"data": pixels} if pixels else {})


def mae_weights(stored: StoredWeights, config: MAEConfig) -> dict[str, Tensor]:
    """The state dict for `MAE(config).load_state_dict`.

    Raises:
        WeightsError: an encoder without a decoder, a model of another size, or of other heads, mean or std.
    """
    check_has_decoder(stored)
    with torch.device("meta"):
        expected = MAE(config).state_dict()
    check_shapes(stored, expected)
    check_known(stored, config, "heads", "decoder_heads", "mean", "std")
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
    check_shapes(StoredWeights(stored.file, weights, stored.grid), expected)
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
    pixels = {"mean": MAEConfig.mean, "std": MAEConfig.std} | values.get("data", {})
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
    if (expected_pool := stored.known.get("pool", pool)) != pool:
        raise WeightsError(
            f"{stored.file}: the configuration next to it classifies by {expected_pool}, and its tensors, "
            f"{'with' if pool == 'mean' else 'without'} fc_norm, by {pool}; such a model would be computed wrongly"
        )
    try:
        config = ClassifierConfig(**sizes, classes=len(head), pool=pool, drop_path=0.0)
    except ValueError as error:
        raise WeightsError(f"{stored.file}: {error}; give --heads") from None
    model = build_classifier(config)
    if probe:
        make_linear_probe(model)
    expected = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    weights = {name: tensor for name, tensor in stored.tensors.items() if tensor.is_floating_point()}
    check_shapes(StoredWeights(stored.file, weights, stored.grid), expected)
    model.load_state_dict(weights, strict=False)  # the file may lack a BatchNorm's count of batches
    return model, config, mean, std


def check_shapes(stored: StoredWeights, expected: Weights) -> None:
    """Raises WeightsError unless the tensors of `stored` have the names and shapes of `expected`."""
    if phrases := mismatches(stored.tensors, expected):
        raise WeightsError(
            f"{stored.file} looks like {describe_model(stored.tensors)}, and the model is {describe_model(expected)}: "
            f"{_some(phrases, '; ')}"
        )


def check_has_decoder(stored: StoredWeights) -> None:
    """Raises WeightsError for an encoder alone."""
    if not has_decoder(stored.tensors):
        raise WeightsError(
            f"{stored.file} holds an encoder alone ({describe_model(stored.tensors)}), as the published mae_pretrain_* "
            "do: it can be fine-tuned, but reconstruction needs a decoder; give a full checkpoint"
        )


def check_known(stored: StoredWeights, config: MAEConfig, *names: str) -> None:
    """Raises WeightsError if a configuration next to the weights has other values of these fields than `config`."""
    for name in names:
        if stored.known.get(name, value := getattr(config, name)) != value:
            raise WeightsError(
                f"{stored.file} was trained with {name} {stored.known[name]}, and model.{name} is {value}; "
                "make them equal"
            )


def _check_sizes(tensors: Weights, known: Mapping[str, Any]) -> None:
    """Raises ValueError if a configuration gives another size than the tensors have."""
    for name, found in encoder_shape(tensors).items():
        if known.get(name, found) != found:
            raise ValueError(f"the configuration next to it has {name} {known[name]}, its tensors have {found}")


def _some(phrases: list[str], separator: str) -> str:
    more = f" and {len(phrases) - _MAX_NAMED} more" if len(phrases) > _MAX_NAMED else ""
    return separator.join(phrases[:_MAX_NAMED]) + more


def _mae_config(known: Mapping[str, Any]) -> MAEConfig:
    return MAEConfig(**{name: value for name, value in known.items() if name != "pool"})


def _grid(tensors: Weights, known: Mapping[str, Any]) -> tuple[int, int] | None:
    if "image_size" not in known:
        return square_grid(tensors)
    patch = tensors["patch_embed.proj.weight"].shape[-1]
    return known["image_size"][0] // patch, known["image_size"][1] // patch


def weights_file(path: Path) -> Path:
    """The file of weights that `path` names: of a run's newest checkpoint, in a folder, or `path` itself."""
    if not path.is_dir():
        return path
    if (folder := RunFolder(path)).config.exists():
        path = folder.checkpoints.at(folder.last_step())
    for name in FOLDER_NAMES:
        if (path / name).exists():
            return path / name
    raise WeightsError(
        f"{path} holds no weights: it is not a run, and has none of {', '.join(FOLDER_NAMES)}; give a run or a file"
    )


def _check_digest(file: Path) -> None:
    """Raises WeightsError if a checkpoint's file differs from its manifest; without a manifest, checks nothing."""
    folders = [path.parent for path in spellings(file)]
    if not (file.parent / MANIFEST).exists() or not (
        (file.parent / STATE).exists() or any(CheckpointStore(folder.parent).is_name(folder.name) for folder in folders)
    ):
        return
    if fault := checkpoint_fault(file.parent, only=file.name):
        raise WeightsError(f"{file.parent}: {fault}; give another checkpoint's folder")
