"""Writes weights in the formats of other libraries: the reference implementation, timm, and Hugging Face.

Each `write_*` function fills a folder with weights and the configuration that the library reads, and returns what the
model card says about them.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from maelstream.jobs.weights.export_names import Format
from maelstream.model.config import MAEConfig
from maelstream.model.formats import has_decoder, to_hf_file
from maelstream.model.sizes import VIT_B16, VIT_H14, VIT_L16, ViTSize
from maelstream.pipeline.config import evaluation_margin
from maelstream.shards.errors import MaelstreamError

# The models that timm publishes with the tag `.mae`.
_TIMM = {
    VIT_B16: "vit_base_patch16_224",
    VIT_L16: "vit_large_patch16_224",
    VIT_H14: "vit_huge_patch14_224",
}


@dataclass(frozen=True)
class FormatCard:
    """The parts of a model card that depend on the format."""

    library: str
    files: dict[str, str]
    """What each file holds, by file name."""
    load: str
    """Python code that loads the weights when run inside the folder."""


def write_reference(folder: Path, weights: dict[str, Tensor], config: MAEConfig) -> FormatCard:
    """Writes `{"model": state_dict}`, as the authors publish their weights, and the same weights as safetensors."""
    save_file(weights, folder / "weights.safetensors")
    torch.save({"model": weights}, folder / "weights.pth")
    return FormatCard(
        library="pytorch",
        files={
            "weights.safetensors": "the weights, float32, under the names of the paper's reference implementation",
            "weights.pth": 'the same as `{"model": state_dict}`, for code that reads the published checkpoints',
        },
        load='import torch\n\nweights = torch.load("weights.pth", weights_only=True)["model"]',
    )


def write_timm(folder: Path, weights: dict[str, Tensor], config: MAEConfig) -> FormatCard:
    """Writes an encoder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads without a missing key."""
    architecture = _TIMM.get(ViTSize(config.dim, config.depth, config.heads, config.patch_size))
    settings = timm_config(config, architecture or "vit_base_patch16_224")
    write_json(folder / "config.json", settings)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    load = 'import timm\n\nmodel = timm.create_model("local-dir:.", pretrained=True)'
    if architecture and (config.image_size, config.in_chans, config.mlp_ratio) == ((224, 224), 3, 4.0):
        load += (
            f'\n# or by the name of the published model:\nmodel = timm.create_model(\n    "{architecture}.mae", '
            'pretrained=True, pretrained_cfg_overlay={"file": "model.safetensors"}\n)'
        )
    return FormatCard(
        library="timm",
        files={
            "model.safetensors": "the encoder, float32; timm's ViT has no decoder",
            "config.json": "timm's configuration: architecture, arguments, mean and deviation of the pixels",
        },
        load=load,
    )


def write_hf(folder: Path, weights: dict[str, Tensor], config: MAEConfig) -> FormatCard:
    """Writes weights that `ViTMAEForPreTraining.from_pretrained` loads, or `ViTMAEModel` for an encoder alone.

    Raises:
        MaelstreamError: a model that ViTMAE cannot represent.
    """
    architecture = "ViTMAEForPreTraining" if has_decoder(weights) else "ViTMAEModel"
    if config.image_size[0] != config.image_size[1]:
        raise MaelstreamError(
            f"Hugging Face's ViTMAE takes square images, not {config.image_size}; export to timm instead"
        )
    if has_decoder(weights) and config.target not in ("pixel", "normalised_pixel"):
        raise MaelstreamError(f"Hugging Face's ViTMAE predicts pixels, not target {config.target}; add --encoder-only")
    try:
        renamed = to_hf_file(weights)
    except ValueError as error:
        raise MaelstreamError(f"{error}; add --encoder-only") from None
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", hf_config(config, architecture))
    write_json(folder / "preprocessor_config.json", hf_preprocessing(config))
    load = (
        f"from transformers import AutoImageProcessor, {architecture}\n\n"
        'processor = AutoImageProcessor.from_pretrained(".")\n'
    )
    if has_decoder(weights):
        load += f'model = {architecture}.from_pretrained(".")'
    else:  # by default ViTMAEModel masks and shuffles patches even to extract features
        load += (
            f'model = {architecture}.from_pretrained(".", mask_ratio=0.0)\n'
            f"# Ascending noise keeps the patches in order: noise = torch.arange({config.num_patches}.0)\n"
            "# features = model(pixel_values=pixels, noise=noise.expand(len(pixels), -1)).last_hidden_state"
        )
    return FormatCard(
        library="transformers",
        files={
            "model.safetensors": f"the weights of `{architecture}`, float32, under the names of published checkpoints",
            "config.json": "transformers' configuration: sizes, mask ratio, target, epsilon",
            "preprocessor_config.json": "transformers' image processor: size, crop, mean and deviation of pixels",
        },
        load=load,
    )


FORMATS: dict[Format, Callable[[Path, dict[str, Tensor], MAEConfig], FormatCard]] = {
    "reference": write_reference,
    "timm": write_timm,
    "hf": write_hf,
}


def timm_config(config: MAEConfig, architecture: str) -> dict[str, Any]:
    """timm's `config.json`. Every size is an argument, so the function of any architecture builds this model."""
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": config.dim,
        "global_pool": "token",
        "model_args": {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "in_chans": config.in_chans,
            "embed_dim": config.dim,
            "depth": config.depth,
            "num_heads": config.heads,
            "mlp_ratio": config.mlp_ratio,
        },
        "pretrained_cfg": {
            "tag": "mae",
            "input_size": [config.in_chans, *config.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": round(1 / evaluation_margin(config.image_size), 3),
            "mean": config.mean,
            "std": config.std,
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def hf_config(config: MAEConfig, architecture: str) -> dict[str, Any]:
    """transformers' `config.json` of a ViTMAE. The default epsilon, 1e-12, would change predictions by 2e-4."""
    return {
        "architectures": [architecture],
        "model_type": "vit_mae",
        "dtype": "float32",
        "image_size": config.image_size[0],
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.dim * config.mlp_ratio),
        "decoder_hidden_size": config.decoder_dim,
        "decoder_num_hidden_layers": config.decoder_depth,
        "decoder_num_attention_heads": config.decoder_heads,
        "decoder_intermediate_size": int(config.decoder_dim * config.mlp_ratio),
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "mask_ratio": config.mask_ratio,
        "norm_pix_loss": config.target == "normalised_pixel",
    }


def hf_preprocessing(config: MAEConfig) -> dict[str, Any]:
    """transformers' `preprocessor_config.json`: the crop of our evaluation, then the model's normalisation.

    The images are square. ViTImageProcessor, the default of ViTMAE, squashes them to that shape up to transformers 4.
    """
    side = config.image_size[0]
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": math.floor(side * evaluation_margin(config.image_size) + 1e-6)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": config.mean,
        "image_std": config.std,
    }


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
