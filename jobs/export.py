"""`maelstream export RUN --format F`: a run's weights as the reference's code, timm or Hugging Face load them.

A folder with safetensors, the configuration that the other side reads, and a model card. It is written under another
name and renamed: whole or absent. Position tables are the exact float32 ones, computed from the configuration.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor

from maelstream.jobs.arguments import parsed
from maelstream.jobs.reporting.model_card import Card, model_card
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.reading import EXPORT_NAME, mae_weights, read_weights
from maelstream.model.config import MAEConfig
from maelstream.model.formats import encoder_of, has_decoder, likely_model, to_hf_file
from maelstream.model.mae import position_tables
from maelstream.shards.durable import sync
from maelstream.shards.errors import MaelstreamError

Format = Literal["reference", "timm", "hf"]

# (dim, depth, heads, patch_size): the models of which timm has a `.mae`.
_TIMM = {
    (768, 12, 12, 16): "vit_base_patch16_224",
    (1024, 24, 16, 16): "vit_large_patch16_224",
    (1280, 32, 16, 14): "vit_huge_patch14_224",
}


@dataclass(frozen=True)
class Export:
    """Write a run's weights in another format, with a model card that tells how to load them."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run's folder."""
    format: Format
    """The reference implementation's names, as safetensors and as `.pth`; timm's ViT, which is the encoder alone; or
    Hugging Face's ViTMAE."""
    out: Path | None = None
    """Folder to write; an older export there is replaced. RUN/export/FORMAT-step-XXXXXXXX if not given."""
    step: int | None = None
    """Of which checkpoint; the newest if not given."""
    encoder_only: bool = False
    """Leave the decoder out, which nothing but reconstruction and further pre-training needs."""


def write_reference(folder: Path, weights: dict[str, Tensor], config: MAEConfig) -> Card:
    """As the authors publish theirs: `{"model": state_dict}`, and the same as safetensors."""
    save_file(weights, folder / "weights.safetensors")
    torch.save({"model": weights}, folder / "weights.pth")
    return Card(
        library="pytorch",
        files={
            "weights.safetensors": "the weights, float32, under the names of the paper's reference implementation",
            "weights.pth": 'the same as `{"model": state_dict}`, for code that reads the published checkpoints',
        },
        load='import torch\n\nweights = torch.load("weights.pth", weights_only=True)["model"]',
    )


def write_timm(folder: Path, weights: dict[str, Tensor], config: MAEConfig) -> Card:
    """What `timm.create_model("local-dir:FOLDER", pretrained=True)` loads, strictly."""
    architecture = _TIMM.get((config.dim, config.depth, config.heads, config.patch_size))
    settings = timm_config(config, architecture or "vit_base_patch16_224")
    _write_json(folder / "config.json", settings)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    load = 'import timm\n\nmodel = timm.create_model("local-dir:.", pretrained=True)'
    if architecture and (config.image_size, config.in_chans, config.mlp_ratio) == ((224, 224), 3, 4.0):
        load += (
            f'\n# or, by the name of the published model:\nmodel = timm.create_model(\n    "{architecture}.mae", '
            'pretrained=True, pretrained_cfg_overlay={"file": "model.safetensors"}\n)'
        )
    return Card(
        library="timm",
        files={
            "model.safetensors": "the encoder, float32; timm's ViT has no decoder",
            "config.json": "of timm: architecture, arguments, mean and deviation of the pixels",
        },
        load=load,
    )


def write_hf(folder: Path, weights: dict[str, Tensor], config: MAEConfig) -> Card:
    """What `ViTMAEForPreTraining.from_pretrained(FOLDER)` loads; `ViTMAEModel` for an encoder alone."""
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
    _write_json(folder / "config.json", hf_config(config, architecture))
    _write_json(folder / "preprocessor_config.json", hf_preprocessing(config))
    load = (
        f"from transformers import {architecture}, ViTImageProcessor\n\n"
        'processor = ViTImageProcessor.from_pretrained(".")\n'
    )
    if has_decoder(weights):
        load += f'model = {architecture}.from_pretrained(".")'
    else:  # it would mask and shuffle the patches of every image, also for features
        load += (
            f'model = {architecture}.from_pretrained(".", mask_ratio=0.0)\n'
            f"# A rising noise leaves the patches in order: noise = torch.arange({config.num_patches}.0)\n"
            "# features = model(pixel_values=pixels, noise=noise.expand(len(pixels), -1)).last_hidden_state"
        )
    return Card(
        library="transformers",
        files={
            "model.safetensors": f"the weights of `{architecture}`, float32, named as transformers' published ones",
            "config.json": "of transformers: sizes, mask ratio, target, epsilon",
            "preprocessor_config.json": "of transformers: image size, mean and deviation of the pixels",
        },
        load=load,
    )


FORMATS: dict[Format, Callable[[Path, dict[str, Tensor], MAEConfig], Card]] = {
    "reference": write_reference,
    "timm": write_timm,
    "hf": write_hf,
}


def timm_config(config: MAEConfig, architecture: str) -> dict[str, Any]:
    """timm's `config.json`: every size is an argument, so that any architecture's function builds this model."""
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
            "crop_pct": 0.9,
            "mean": config.mean,
            "std": config.std,
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def hf_config(config: MAEConfig, architecture: str) -> dict[str, Any]:
    """transformers' `config.json` of a ViTMAE. Its own default epsilon, 1e-12, moves predictions by 2e-4."""
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
    """transformers' `preprocessor_config.json`: bicubic to the image size, then our mean and deviation."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_size[0], "width": config.image_size[1]},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": config.mean,
        "image_std": config.std,
    }


def export(folder: RunFolder, step: int, format: Format, encoder_only: bool, out: Path) -> None:
    """Writes the checkpoint of `step` to `out`; MaelstreamError for weights or a folder that must not be used."""
    if out.exists() and not (out / EXPORT_NAME).exists() and (not out.is_dir() or any(out.iterdir())):
        raise MaelstreamError(f"--out {out} holds something that is no export; choose another folder")
    recipe = folder.recipe()
    stored = read_weights(folder.checkpoints.at(step))
    weights = mae_weights(stored, recipe.model) | position_tables(recipe.model)
    if encoder_only or format == "timm":
        weights = encoder_of(weights)
    aside, replaced = out.with_name(out.name + ".writing"), out.with_name(out.name + ".replaced")
    try:
        for left_behind in (aside, replaced):
            shutil.rmtree(left_behind, ignore_errors=True)
        aside.mkdir(parents=True)
        card = FORMATS[format](aside, weights, recipe.model)
        _write_json(aside / EXPORT_NAME, {"format": format, "step": step, "model": asdict(recipe.model)})
        (aside / "README.md").write_text(model_card(folder, step, likely_model(weights), card))
        for path in [*aside.iterdir(), aside]:
            sync(path)
        if out.exists():
            out.rename(replaced)
        aside.rename(out)
        sync(out.parent)
    except OSError as error:
        raise MaelstreamError(f"--out {out} cannot be written ({error.strerror}); choose another folder") from None
    finally:
        for left_behind in (aside, replaced):
            shutil.rmtree(left_behind, ignore_errors=True)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def main(args: list[str]) -> int:
    """`maelstream export`; 0 when the folder is written."""
    command = parsed(Export, args, "export")
    folder = RunFolder(command.run)
    folder.recipe()  # before anything else: is it a run?
    step = folder.last_step() if command.step is None else command.step
    if step not in (steps := folder.checkpoints.steps()):
        raise MaelstreamError(f"{folder.path} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    out = (command.out or folder.path / "export" / f"{command.format}-step-{step:08d}").resolve()
    export(folder, step, command.format, command.encoder_only, out)
    for path in sorted(out.iterdir()):
        print(f"{path}  {path.stat().st_size:,} bytes")
    return 0
