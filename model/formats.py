"""Names of MAE weights in other libraries; conversion is exact in both directions and reads or writes no files.

This project uses the names of the reference implementation. timm's ViT has the same names, without the decoder. Hugging
Face's ViTMAE and ViT rename everything and split each `qkv` into query, key and value. Their modules were renamed
between transformers 5.6 and 5.10; files keep the older names, which every release loads (`conversion_mapping.py` in
transformers). Both are read.

Training code wraps a model: DDP puts `module.` before every name, `torch.compile` puts `_orig_mod.`, Lightning the name
of an attribute. `unwrapped` takes any such prefix away, if all weights of the model have it.
"""

import math
import re
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from maelstream.model.sizes import family_name

Weights = Mapping[str, Tensor]
V = TypeVar("V")

CLASS_TOKEN = re.compile(r"^((?:.*?\.)??)((vit\.)?embeddings\.)?cls_token$")
"""Matches the name of a class token, in a model of any prefix; group 1 is the prefix."""
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # at any level of modules
_OWN_NAMES = re.compile(  # names of a MAE or a ViT classifier without a prefix
    r"(cls_token|(encoder_)?mask_token|pos_embed|decoder_pos_embed)$|(patch_embed\.proj|norm|fc_norm|head|head\.1|"
    r"decoder_embed|decoder_norm|decoder_pred|classifier|layernorm|vit\.layernorm)\.(weight|bias)$|"
    r"((decoder_)?blocks|layers|vit\.layers|(vit\.)?encoder\.layer|decoder\.decoder_layers)\.\d+\.|"
    r"(vit\.)?embeddings\.|decoder\.(mask_token|decoder_)"
)
_AVERAGE = re.compile(r"(^|[._])(ema|averaged?|swa)([._]|$)", re.IGNORECASE)
_UNUSED = re.compile(r"(vit\.)?pooler\.")  # Hugging Face's ViTModel has one, which no classifier uses

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
_OUTSIDE = {  # tensors that do not belong to a block
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
    "head.weight": "classifier.weight",  # of ViTForImageClassification
    "head.bias": "classifier.bias",
}
_HF_FILE = {  # names of modules since transformers 5.10, and the names that files have instead
    "vit.layers.": "vit.encoder.layer.",
    "attention.q_proj.": "attention.attention.query.",
    "attention.k_proj.": "attention.attention.key.",
    "attention.v_proj.": "attention.attention.value.",
    "attention.o_proj.": "attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}


def has_decoder(weights: Weights) -> bool:
    """Whether weights (reference names) contain any part of a decoder; the published `mae_pretrain_*` do not."""
    return any(_DECODER.match(name) for name in weights)


def without_decoder(weights: Weights) -> dict[str, Tensor]:
    """The encoder alone, without mask token; timm's ViT with `num_classes=0` loads it with `strict=True`."""
    return {name: tensor for name, tensor in weights.items() if not _DECODER.match(name)}


def is_average(name: str) -> bool:
    """Whether this name of a model, or prefix, is that of an average of the trained weights: `model_ema`."""
    return bool(_AVERAGE.search(name))


def unwrapped(weights: Mapping[str, V]) -> tuple[dict[str, V], list[str]]:
    """Takes away the prefix that wrappers put before every name of a ViT, and drops what is not part of it.

    Of a model and an average of its weights, in one dict under two prefixes, the model is taken. Returns the renamed
    weights, and the names that were dropped. Without a class token, nothing changes.

    Raises:
        ValueError: several models, or a model of which only a part has the prefix.
    """
    names = {_WRAPPERS.sub("", name): name for name in weights}
    if len(names) < len(weights):
        raise ValueError("two tensors have the same name when the prefixes of wrappers are taken away")
    prefixes = [match[1] for name in names if (match := CLASS_TOKEN.match(name))]
    plain = [prefix for prefix in prefixes if not is_average(prefix)]
    if not prefixes:
        return dict(weights), []
    if len(prefixes) > 1 and len(plain) != 1:
        listed = ", ".join(repr(prefix) for prefix in prefixes)
        raise ValueError(f"holds several models, whose names begin with {listed}; save the one you want on its own")
    prefix = plain[0] if plain else prefixes[0]
    found, dropped = dict[str, V](), list[str]()
    for name, original in names.items():
        if name.startswith(prefix) and not _UNUSED.match(name.removeprefix(prefix)):
            found[name.removeprefix(prefix)] = weights[original]
        elif prefix and _OWN_NAMES.match(name):
            raise ValueError(f"a mixture: {prefix}cls_token has the prefix {prefix!r}, and {name} has not")
        else:
            dropped.append(original)
    return found, dropped


def to_hf(weights: Weights) -> dict[str, Tensor]:
    """Rename from reference names to module names of `ViTMAEForPreTraining` and `ViTForImageClassification`.

    Each `qkv` becomes three copied parts.

    Raises:
        ValueError: ViTMAE has no such tensor.
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
    """Like `to_hf`, but with the names that files have, such as the published `facebook/vit-mae-base`."""
    renamed = {}
    for name, tensor in to_hf(weights).items():
        for module, file in _HF_FILE.items():
            name = name.replace(module, file)
        renamed[name] = tensor
    return renamed


def from_hf(weights: Weights) -> dict[str, Tensor]:
    """Inverse of `to_hf` and `to_hf_file`; also reads names of `ViTMAEModel`. Unknown names stay unchanged."""
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
    """Rename weights of any known format to reference names.

    Raises:
        ValueError: the names belong to no known format, or patch kernel or position table have the wrong shape.
    """
    if "cls_token" in weights:
        renamed = dict(weights)
    elif any(_hf_module_name(name) == _OUTSIDE["cls_token"] for name in weights):
        renamed = from_hf(weights)
    else:
        some = ", ".join(list(weights)[:3]) or "none"
        raise ValueError(
            f"not MAE weights: no tensor names of the reference, timm or Hugging Face (the first names are {some})"
        )
    if "patch_embed.proj.weight" not in renamed:
        raise ValueError("patch_embed.proj.weight is missing")
    for name, dimensions in {"patch_embed.proj.weight": 4, "pos_embed": 3}.items():
        if name in renamed and renamed[name].ndim != dimensions:
            raise ValueError(f"{name} is {tuple(renamed[name].shape)}; a ViT has {dimensions} dimensions there")
    return renamed


def mismatches(weights: Weights, expected: Weights) -> list[str]:
    """A phrase for each tensor that is missing, has another shape, or is not in `expected`; values are not compared."""
    phrases = []
    for name, tensor in expected.items():
        if name not in weights:
            phrases.append(f"{name} is missing")
        elif weights[name].shape != tensor.shape:
            phrases.append(f"{name} is {tuple(weights[name].shape)} where the model has {tuple(tensor.shape)}")
    phrases += [f"{name} is not in the model" for name in weights if name not in expected]
    return phrases


def nonfinite_names(weights: Weights) -> list[str]:
    """Names of the tensors that contain NaN or infinity."""
    return [name for name, tensor in weights.items() if not _is_finite(tensor)]


def square_grid(weights: Weights) -> tuple[int, int] | None:
    """Rows and columns of patches if the length of the position table fits a square grid, else None."""
    side = math.isqrt(weights["pos_embed"].shape[1] - 1)
    return (side, side) if side**2 == weights["pos_embed"].shape[1] - 1 else None


def encoder_shape(weights: Weights) -> dict[str, int | float]:
    """Sizes of an encoder that its shapes show, by the fields of `MAEConfig`: all but image size and heads."""
    dim, in_chans, patch_size, _ = weights["patch_embed.proj.weight"].shape
    found: dict[str, int | float] = {"patch_size": patch_size, "in_chans": in_chans, "dim": dim}
    found["depth"] = _depth(weights, "blocks")
    if (hidden := weights.get("blocks.0.mlp.fc1.weight")) is not None:
        found["mlp_ratio"] = len(hidden) / dim
    return found


def decoder_shape(weights: Weights) -> dict[str, int | bool]:
    """Sizes of a decoder that its shapes show, by the fields of `MAEConfig`; ValueError without `decoder_embed`."""
    if "decoder_embed.weight" not in weights:
        raise ValueError("a decoder without decoder_embed.weight")
    return {
        "decoder_dim": len(weights["decoder_embed.weight"]),
        "decoder_depth": _depth(weights, "decoder_blocks"),
        "encoder_mask_tokens": "encoder_mask_token" in weights,
    }


def describe_model(weights: Weights) -> str:
    """Description of a model for messages, from shapes of weights: `ViT-B/16 (768 x 12), 224 x 224 px, no decoder`."""
    dim, _, patch, _ = weights["patch_embed.proj.weight"].shape
    depth = _depth(weights, "blocks")
    text = f"{family_name(dim, depth)}/{patch} ({dim} x {depth})"
    if "pos_embed" in weights and (grid := square_grid(weights)):
        text += f", {grid[0] * patch} x {grid[1] * patch} px"
    if "decoder_embed.weight" in weights:
        return f"{text}, decoder {len(weights['decoder_embed.weight'])} x {_depth(weights, 'decoder_blocks')}"
    return f"{text}, no decoder"


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return bool(tensor.isfinite().all())
    # A sum is finite only if all numbers are, and needs no memory; only a sum of huge numbers overflows.
    return bool(tensor.sum(dtype=torch.float64).isfinite()) or bool(tensor.double().isfinite().all())


def _depth(weights: Weights, stack: str) -> int:
    return 1 + max(
        (int(match[2]) for name in weights if (match := _BLOCK.match(name)) and match[1] == stack), default=-1
    )


def _hf_module_name(name: str) -> str:
    if not name.startswith(("vit.", "decoder.", "classifier.")):  # a ViTMAEModel saved on its own
        name = f"vit.{name}"
    # When transformers 5.23 saves, it also applies its rule for `vit.layers.` to `decoder_layers.`.
    name = name.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers.")
    for module, file in _HF_FILE.items():
        name = name.replace(file, module)
    return name
