"""ViT sizes: the one table of width, depth, heads and patch size (Dosovitskiy et al. 2021; paper, section 4).

Plain numbers: this module imports neither torch nor timm.
"""

from typing import NamedTuple


class ViTSize(NamedTuple):
    """Size of a ViT encoder. The field names are those of `MAEConfig` and `ClassifierConfig`."""

    dim: int
    """Width of the residual stream."""
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads per block."""
    patch_size: int
    """Side of a patch, in pixels."""


VIT_TI16 = ViTSize(192, 12, 3, 16)
VIT_S16 = ViTSize(384, 12, 6, 16)
VIT_B16 = ViTSize(768, 12, 12, 16)
VIT_L16 = ViTSize(1024, 24, 16, 16)
VIT_H14 = ViTSize(1280, 32, 16, 14)

PAPER_SIZES = {"vit_b16": VIT_B16, "vit_l16": VIT_L16, "vit_h14": VIT_H14}
"""The encoders of the MAE paper, under the names that recipe files use."""

_FAMILIES = {"ViT-Ti": VIT_TI16, "ViT-S": VIT_S16, "ViT-B": VIT_B16, "ViT-L": VIT_L16, "ViT-H": VIT_H14}


def paper_name(dim: int, depth: int) -> str | None:
    """The key of `PAPER_SIZES` for this width and depth, for any patch size; None if the paper has no such encoder."""
    return next((name for name, size in PAPER_SIZES.items() if size[:2] == (dim, depth)), None)


def family_name(dim: int, depth: int) -> str:
    """ViT-Ti, ViT-S, ViT-B, ViT-L or ViT-H for this width and depth; otherwise ViT."""
    return next((name for name, size in _FAMILIES.items() if size[:2] == (dim, depth)), "ViT")


def default_heads(dim: int, depth: int) -> int:
    """The usual number of heads for this width and depth: 64 channels per head, 80 in ViT-H.

    The shapes of an encoder's weights do not show the number of heads.
    """
    return VIT_H14.heads if (dim, depth) == VIT_H14[:2] else dim // 64
