"""Writes trained classifiers in the formats of other libraries: the reference implementation, timm, and Hugging Face.

Each `write_*` function fills a folder as those of export_formats.py do for masked autoencoders.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from maelstream.jobs.weights.export_formats import (
    FormatCard,
    hf_preprocessing,
    timm_config,
    write_json,
    write_reference,
)
from maelstream.jobs.weights.export_names import Format
from maelstream.model.config import ClassifierConfig, MAEConfig
from maelstream.model.formats import to_hf_file
from maelstream.shards.errors import MaelstreamError

_PROBE_EPSILON = 1e-6  # of `FeatureNorm` in model/classifier.py


@dataclass(frozen=True)
class ExportedClassifier:
    """A classifier with what its configuration files need."""

    weights: dict[str, Tensor]
    """Under timm's names, float32; the head is a linear layer."""
    config: ClassifierConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    margin: float
    """Size of the resized image divided by the size of the crop in evaluation."""
    labels: tuple[str, ...]
    """Name of each class."""

    @property
    def encoder(self) -> MAEConfig:
        """The sizes of the encoder and its pixels, as the functions of export_formats.py take them."""
        c = self.config
        return MAEConfig(
            *(c.image_size, c.patch_size, c.in_chans, c.dim, c.depth, c.heads, c.mlp_ratio),
            mean=self.mean,
            std=self.std,
        )


def fold_probe(weights: Mapping[str, Tensor], number: int | None) -> dict[str, Tensor]:
    """The weights of a linear probe with its BatchNorm folded into the linear layer, as a plain classifier has it.

    `number` chooses one of several probes; None means that there is a single one. Computed in float64.
    """
    prefix = "head.1." if number is None else f"head.1.{number}."
    mean, variance = (weights[f"head.0.running_{name}"].double() for name in ("mean", "var"))
    matrix = weights[f"{prefix}weight"].double() / (variance + _PROBE_EPSILON).sqrt()
    head = {"head.weight": matrix.float(), "head.bias": (weights[f"{prefix}bias"].double() - matrix @ mean).float()}
    return {name: tensor for name, tensor in weights.items() if not name.startswith("head.")} | head


def write_classifier_reference(folder: Path, classifier: ExportedClassifier) -> FormatCard:
    """Writes `{"model": state_dict}`, as the authors publish fine-tuned weights, and the same as safetensors."""
    return write_reference(folder, classifier.weights, classifier.encoder)


def write_classifier_timm(folder: Path, classifier: ExportedClassifier) -> FormatCard:
    """Writes a classifier that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads without a missing key."""
    config, pool = classifier.config, "avg" if classifier.config.pool == "mean" else "token"
    settings = timm_config(classifier.encoder, "vit_base_patch16_224")
    settings |= {"num_classes": config.classes, "global_pool": pool, "label_names": list(classifier.labels)}
    settings["model_args"] |= {"global_pool": pool}
    settings["pretrained_cfg"] |= {"num_classes": config.classes, "crop_pct": 1 / classifier.margin, "tag": ""}
    write_json(folder / "config.json", settings)
    save_file(classifier.weights, folder / "model.safetensors", {"format": "pt"})
    return FormatCard(
        library="timm",
        files={
            "model.safetensors": "the classifier, float32",
            "config.json": "timm's configuration: architecture, class names, crop, mean and std of the pixels",
        },
        load='import timm\n\nmodel = timm.create_model("local-dir:.", pretrained=True).eval()',
    )


def write_classifier_hf(folder: Path, classifier: ExportedClassifier) -> FormatCard:
    """Writes weights that `ViTForImageClassification.from_pretrained` loads.

    Raises:
        MaelstreamError: a classifier that ViTForImageClassification cannot represent.
    """
    config = classifier.config
    if config.pool != "class_token":
        raise MaelstreamError(
            "Hugging Face's ViTForImageClassification classifies the class token, and this run averages the patch "
            "tokens (model.pool mean); export to timm, or fine-tune with --model.pool class_token"
        )
    if config.image_size[0] != config.image_size[1]:
        raise MaelstreamError(
            f"Hugging Face's ViT takes square images, not {config.image_size}; export to timm instead"
        )
    save_file(to_hf_file(classifier.weights), folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", hf_classifier_config(classifier))
    side = math.floor(config.image_size[0] * classifier.margin + 1e-6)
    preprocessing = hf_preprocessing(classifier.encoder)
    if "shortest_edge" in preprocessing["size"]:
        preprocessing["size"] = {"shortest_edge": side}
    write_json(folder / "preprocessor_config.json", preprocessing)
    return FormatCard(
        library="transformers",
        files={
            "model.safetensors": "the weights of `ViTForImageClassification`, float32",
            "config.json": "transformers' configuration: sizes, epsilon, names of the classes",
            "preprocessor_config.json": "transformers' image processor: resize, crop, mean and std of the pixels",
        },
        load=(
            "from transformers import AutoImageProcessor, ViTForImageClassification\n\n"
            'processor = AutoImageProcessor.from_pretrained(".")\n'
            'model = ViTForImageClassification.from_pretrained(".")'
        ),
    )


CLASSIFIER_FORMATS: dict[Format, Callable[[Path, ExportedClassifier], FormatCard]] = {
    "reference": write_classifier_reference,
    "timm": write_classifier_timm,
    "hf": write_classifier_hf,
}


def hf_classifier_config(classifier: ExportedClassifier) -> dict[str, Any]:
    """transformers' `config.json` of a ViTForImageClassification."""
    config = classifier.config
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "dtype": "float32",
        "image_size": config.image_size[0],
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.dim * config.mlp_ratio),
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "id2label": {str(number): name for number, name in enumerate(classifier.labels)},
        "label2id": {name: number for number, name in enumerate(classifier.labels)},
    }
