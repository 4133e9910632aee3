"""MAE weights under the names of others, exact both ways: tensors in, the same tensors out, no files.

Ours are the reference implementation's names. timm's ViT has the same ones without the decoder. Hugging Face's ViTMAE
renames everything and splits each `qkv` into query, key and value. Its modules were renamed between transformers 5.6
and 5.10; files keep the older names, which every release loads (`conversion_mapping.py` there). Both are read.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from maelstream.model.sizes import family_name

Weights = Mapping[str, Tensor]

_DECODER = re.compile(r"decoder_|(encoder_)?mask_token$")
_BLOCK = re.compile(r"(blocks|decoder_blocks)\.(\d+)\.(.+)\.(weight|bias)")
_HF_BLOCK = re.compile(r"(vit\.layers|decoder\.decoder_layers)\.(\d+)\.(.+)\.(weight|bias)")
_STACKS = {"blocks": "vit.layers", "decoder_blocks": "decoder.decoder_layers"}
_PARTS = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_SPLIT = [f"attention.{part}_proj" for part in "qkv"]
_OUTSIDE = {  # of the blocks
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
    "norm.weight": "vit.layernorm.weight",
    "norm.bias": "vit.layernorm.bias",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed.weight": "decoder.decoder_embed.weight",
    "decoder_embed.bias": "decoder.decoder_embed.bias",
    "decoder_norm.weight": "decoder.decoder_norm.weight",
    "decoder_norm.bias": "decoder.decoder_norm.bias",
    "decoder_pred.weight": "decoder.decoder_pred.weight",
    "decoder_pred.bias": "decoder.decoder_pred.bias",
}
_HF_FILE = {  # what files have where transformers' modules since 5.10 have other names
    "vit.layers.": "vit.encoder.layer.",
    "attention.q_proj.": "attention.attention.query.",
    "attention.k_proj.": "attention.attention.key.",
    "attention.v_proj.": "attention.attention.value.",
    "attention.o_proj.": "attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}


def has_decoder(weights: Weights) -> bool:
    """Whether weights under the reference's names hold any part of a decoder; the published `mae_pretrain_*` do not."""
    return any(_DECODER.match(name) for name in weights)


def encoder_of(weights: Weights) -> dict[str, Tensor]:
    """The encoder alone, without a mask token: what timm's ViT with `num_classes=0` takes, strictly."""
    return {name: tensor for name, tensor in weights.items() if not _DECODER.match(name)}


def to_hf(weights: Weights) -> dict[str, Tensor]:
    """The reference's names as those of `ViTMAEForPreTraining`'s modules; each `qkv` in three copied parts.

    Raises:
        ValueError: a tensor that ViTMAE does not have.
    """
    renamed = {}
    for name, tensor in weights.items():
        if (match := _BLOCK.fullmatch(name)) is None:
            if name not in _OUTSIDE:
                raise ValueError(f"Hugging Face's ViTMAE has no {name}")
            renamed[_OUTSIDE[name]] = tensor
            continue
        stack, number, part, kind = match.groups()
        block = f"{_STACKS[stack]}.{number}"
        if part == "attn.qkv":
            for split, third in zip(_SPLIT, tensor.chunk(3), strict=True):
                renamed[f"{block}.{split}.{kind}"] = third.clone()
        else:
            renamed[f"{block}.{_PARTS[part]}.{kind}"] = tensor
    return renamed


def to_hf_file(weights: Weights) -> dict[str, Tensor]:
    """As `to_hf`, under the names of files, those of the published `facebook/vit-mae-base`."""
    renamed = {}
    for name, tensor in to_hf(weights).items():
        for module, file in _HF_FILE.items():
            name = name.replace(module, file)
        renamed[name] = tensor
    return renamed


def from_hf(weights: Weights) -> dict[str, Tensor]:
    """Inverse of `to_hf` and `to_hf_file`; reads `ViTMAEModel`'s names, too. Unknown names stay as they are."""
    weights = {_hf_module_name(name): tensor for name, tensor in weights.items()}
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    stacks = {theirs: ours for ours, theirs in _STACKS.items()}
    parts = {theirs: ours for ours, theirs in _PARTS.items()}
    renamed = {}
    for name, tensor in weights.items():
        stack, number, part, kind = match.groups() if (match := _HF_BLOCK.fullmatch(name)) else ("", "", "", "")
        thirds = [f"{stack}.{number}.{split}.{kind}" for split in _SPLIT]
        if part in parts:
            renamed[f"{stacks[stack]}.{number}.{parts[part]}.{kind}"] = tensor
        elif part in _SPLIT and all(third in weights for third in thirds):
            renamed[f"{stacks[stack]}.{number}.attn.qkv.{kind}"] = torch.cat([weights[third] for third in thirds])
        else:
            renamed[outside.get(name, name)] = tensor
    return renamed


def to_reference(weights: Weights) -> dict[str, Tensor]:
    """Weights of any format under the reference's names.

    Raises:
        ValueError: names of none of the formats, or a patch kernel or position table that is no ViT's.
    """
    if "cls_token" in weights:
        renamed = dict(weights)
    elif any(_hf_module_name(name) == _OUTSIDE["cls_token"] for name in weights):
        renamed = from_hf(weights)
    else:
        some = ", ".join(list(weights)[:3]) or "none"
        raise ValueError(f"names of no MAE (the first: {some}); known are the reference's, timm's and Hugging Face's")
    if "patch_embed.proj.weight" not in renamed:
        raise ValueError("patch_embed.proj.weight is missing")
    for name, dimensions in {"patch_embed.proj.weight": 4, "pos_embed": 3}.items():
        if name in renamed and renamed[name].ndim != dimensions:
            raise ValueError(f"{name} is {tuple(renamed[name].shape)}, which is no ViT's")
    return renamed


def mismatches(weights: Weights, expected: Weights) -> list[str]:
    """A phrase for each tensor that is missing, of another shape, or not in `expected`, whose values do not matter."""
    phrases = []
    for name, tensor in expected.items():
        if name not in weights:
            phrases.append(f"{name} is missing")
        elif weights[name].shape != tensor.shape:
            phrases.append(f"{name} is {tuple(weights[name].shape)} where the model has {tuple(tensor.shape)}")
    phrases += [f"{name} is not in the model" for name in weights if name not in expected]
    return phrases


def not_finite(weights: Weights) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    return [name for name, tensor in weights.items() if not tensor.isfinite().all()]


def square_grid(weights: Weights) -> tuple[int, int] | None:
    """Rows and columns of patches if the position table is of a square grid, as far as its length tells."""
    side = math.isqrt(weights["pos_embed"].shape[1] - 1)
    return (side, side) if side**2 == weights["pos_embed"].shape[1] - 1 else None


def likely_model(weights: Weights) -> str:
    """What the shapes under the reference's names tell of a model, for a message: ViT-B/16 (768 x 12), 224 x 224 px."""
    dim, _, patch, _ = weights["patch_embed.proj.weight"].shape
    depth = _depth(weights, "blocks")
    text = f"{family_name(dim, depth)}/{patch} ({dim} x {depth})"
    if "pos_embed" in weights and (grid := square_grid(weights)):
        text += f", {grid[0] * patch} x {grid[1] * patch} px"
    if "decoder_embed.weight" in weights:
        return f"{text}, decoder {len(weights['decoder_embed.weight'])} x {_depth(weights, 'decoder_blocks')}"
    return f"{text}, no decoder"


def _depth(weights: Weights, stack: str) -> int:
    return 1 + max(
        (int(match[2]) for name in weights if (match := _BLOCK.match(name)) and match[1] == stack), default=-1
    )


def _hf_module_name(name: str) -> str:
    if not name.startswith(("vit.", "decoder.")):  # a ViTMAEModel that was saved alone
        name = f"vit.{name}"
    # transformers 5.23 applies its rule for `vit.layers.` to `decoder_layers.`, too, when it saves.
    name = name.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers.")
    for module, file in _HF_FILE.items():
        name = name.replace(file, module)
    return name
