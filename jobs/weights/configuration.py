"""What a configuration next to a file of weights says: of a run, an export, Hugging Face, or timm.

The shapes of tensors do not show the number of heads, the pixels' mean and standard deviation, the epsilon of the norms
or the kind of target. A configuration that describes a model of another kind is an error: its features would be
silently wrong.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from maelstream.jobs.recipe import ClassificationRecipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.errors import WeightsError
from maelstream.jobs.weights.export_names import EXPORT_NAME
from maelstream.jobs.weights.tensor_files import FOLDER_NAMES, report
from maelstream.model.config import ENCODER_SIZES, ClassifierConfig, MAEConfig

_EPSILON = 1e-6  # of every norm in model/
_TIMM_ARGUMENTS = {"img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes"}
_TIMM_NEUTRAL = {  # arguments that change nothing when features are computed, or that are what model/ has
    "class_token": (True,),
    "qkv_bias": (True,),
    "qk_norm": (False,),
    "init_values": (None,),
    "no_embed_class": (False,),
    "reg_tokens": (0,),
    "pre_norm": (False,),
    "dynamic_img_size": (True, False),
    "global_pool": ("token", "avg", ""),
    "fc_norm": (None,),
    "drop_rate": (),
    "drop_path_rate": (),
    "pos_drop_rate": (),
    "weight_init": (),
}


def known_values(file: Path) -> dict[str, Any]:
    """Fields of `MAEConfig`, and `pool`, that a configuration next to `file` gives; empty without one.

    Raises:
        WeightsError: a damaged configuration, or one of a model that model/ does not have.
    """
    if (export := file.parent / EXPORT_NAME).exists():
        return _of_export(export)
    if (run := run_of(file)) is not None:
        recipe = run.any_recipe()
        if isinstance(recipe, ClassificationRecipe):
            return classifier_fields(recipe.model, recipe.data.mean, recipe.data.std)
        return dict(vars(recipe.model))
    if file.name not in FOLDER_NAMES:  # a file that happens to be next to some config.json
        return {}
    config = _json(file.parent / "config.json")
    if "model_type" in config:
        return _of_hugging_face(file.parent, config)
    if "architecture" in config:
        return _of_timm(file.parent / "config.json", config)
    return {}


def classifier_fields(config: ClassifierConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    """What a classifier's configuration gives for `known_values`."""
    sizes = {name: getattr(config, name) for name in ENCODER_SIZES}
    return sizes | {"mean": tuple(mean), "std": tuple(std), "pool": config.pool}


def run_of(file: Path) -> RunFolder | None:
    """The run that `file` is a checkpoint's file of; links may lead to it, or from it to another disk."""
    for path in spellings(file):
        run = RunFolder(path.parent.parent.parent)
        if path.parent.parent == run.checkpoints.folder and run.config.exists():
            return run
    return None


def spellings(path: Path) -> Iterator[Path]:
    """`path` as given, and after each symbolic link in it is followed, one after another."""
    current = Path(os.path.abspath(path))
    yield current
    for _ in range(40):  # as many as Linux follows
        link = next((part for part in [*reversed(current.parents), current] if part.is_symlink()), None)
        if link is None:
            return
        current = Path(os.path.abspath(link.parent / link.readlink() / current.relative_to(link)))
        yield current


def _of_export(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
        if "classifier" in values:
            config = TypeAdapter(ClassifierConfig).validate_python(values["classifier"])
            return classifier_fields(config, values["mean"], values["std"])
        return dict(vars(TypeAdapter(MAEConfig).validate_python(values["model"])))
    except (ValueError, LookupError, TypeError):
        raise WeightsError(f"{file} is damaged, or of another version; export the run again") from None


def _of_hugging_face(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    file = folder / "config.json"
    if (kind := config["model_type"]) not in ("vit", "vit_mae"):
        raise WeightsError(f"{file}: model_type {kind}, and only vit and vit_mae are ViTs as in the MAE paper")
    _refuse(
        file,
        {
            name: config[name]
            for name, expected in {"hidden_act": "gelu", "qkv_bias": True}.items()
            if config.get(name, expected) != expected
        },
    )
    epsilon = config.get("layer_norm_eps", 1e-12)  # transformers' default
    if not 0 <= epsilon <= _EPSILON:
        _refuse(file, {"layer_norm_eps": epsilon})
    if epsilon != _EPSILON:
        report(
            f"{file}: layer_norm_eps {epsilon:g} is read as {_EPSILON:g}, which MAE and ViT are trained with; "
            "predictions differ by about 2e-4"
        )
    fields = {"num_attention_heads": "heads", "hidden_size": "dim", "num_hidden_layers": "depth"}
    fields |= {"num_channels": "in_chans", "decoder_num_attention_heads": "decoder_heads", "mask_ratio": "mask_ratio"}
    defaults = {"num_attention_heads": 12, "image_size": 224}
    if kind == "vit_mae":
        defaults |= {"decoder_num_attention_heads": 16}
    config = defaults | config
    found = {ours: config[theirs] for theirs, ours in fields.items() if theirs in config}
    found["image_size"] = _pair(file, "image_size", config["image_size"])
    if "patch_size" in config:
        found["patch_size"] = _pair(file, "patch_size", config["patch_size"])[0]
    if kind == "vit_mae":
        found["target"] = "normalised_pixel" if config.get("norm_pix_loss", False) else "pixel"
    else:
        found["pool"] = "class_token"
    return found | _pixels_of_hugging_face(folder)


def _pixels_of_hugging_face(folder: Path) -> dict[str, Any]:
    """`mean` and `std` of pixels that are scaled to 0..1, from the image processor's configuration."""
    file = folder / "preprocessor_config.json"
    values = _json(file)
    if not values:
        report(f"{folder} has no {file.name}: assuming ImageNet's mean and std of the pixels")
        return {}
    scale = 255 * float(values.get("rescale_factor", 1 / 255)) if values.get("do_rescale", True) else 255.0
    if math.isclose(scale, 1, rel_tol=1e-6):
        scale = 1.0
    if not values.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    else:
        mean, std = values.get("image_mean", [0.5] * 3), values.get("image_std", [0.5] * 3)  # transformers' default
    try:
        return {"mean": tuple(each / scale for each in mean), "std": tuple(each / scale for each in std)}
    except (TypeError, ZeroDivisionError):
        raise WeightsError(f"{file}: image_mean and image_std must be lists of numbers") from None


def _of_timm(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    arguments, pretrained = config.get("model_args") or {}, config.get("pretrained_cfg") or config
    _refuse(
        file,
        {
            name: value
            for name, value in arguments.items()
            if name not in _TIMM_ARGUMENTS
            and (name not in _TIMM_NEUTRAL or (_TIMM_NEUTRAL[name] and value not in _TIMM_NEUTRAL[name]))
        },
    )
    if "quickgelu" in config["architecture"]:
        _refuse(file, {"architecture": config["architecture"]})
    fields = {"patch_size": "patch_size", "in_chans": "in_chans", "embed_dim": "dim", "depth": "depth"}
    fields |= {"num_heads": "heads", "mlp_ratio": "mlp_ratio"}
    found = {ours: arguments[theirs] for theirs, ours in fields.items() if theirs in arguments}
    size = arguments.get("img_size") or (pretrained.get("input_size") or [0, 0])[1:]
    if size and size != [0]:
        found["image_size"] = _pair(file, "img_size", size)
    for name in ("mean", "std"):
        if name in pretrained:
            found[name] = tuple(pretrained[name])
    if config.get("num_classes") and "global_pool" in config:
        found["pool"] = "mean" if config["global_pool"] == "avg" else "class_token"
    return found


def _refuse(file: Path, values: dict[str, Any]) -> None:
    """Raises WeightsError if there are `values`, which model/ does not have."""
    if values:
        listed = ", ".join(f"{name} {value}" for name, value in values.items())
        raise WeightsError(
            f"{file}: {listed}: a ViT as in the MAE paper has exact GELU, a bias in qkv and an epsilon of {_EPSILON:g} "
            "in its norms; another model would be computed wrongly, so it is not read"
        )


def _pair(file: Path, name: str, value: Any) -> tuple[int, int]:
    """Height and width from a number or a pair."""
    sides = [value, value] if isinstance(value, int) else value
    if not (isinstance(sides, list) and len(sides) == 2 and all(isinstance(side, int) for side in sides)):
        raise WeightsError(f"{file}: {name} {value} is neither a number nor a pair")
    return sides[0], sides[1]


def _json(file: Path) -> dict[str, Any]:
    """The values of a JSON file; empty if there is none."""
    if not file.exists():
        return {}
    try:
        values = json.loads(file.read_text())
    except (ValueError, OSError):
        raise WeightsError(f"{file} is damaged; fetch it again") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{file} must hold an object with keys")
    return values
