"""Configuration of the models: frozen dataclasses that check their values, as a recipe holds them.

This module imports neither torch nor timm, so that commands can read a recipe without loading them.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from maelstream.model.sizes import VIT_B16

MaskKind = Literal["random", "block", "grid"]
Target = Literal["pixel", "normalised_pixel", "pca", "token"]
AttentionKind = Literal["auto", "sdpa", "math"]
Pool = Literal["mean", "class_token"]
ENCODER_SIZES = ("image_size", "patch_size", "in_chans", "dim", "depth", "heads", "mlp_ratio")
"""The fields of `MAEConfig` and `ClassifierConfig` that an encoder's weights determine."""


@dataclass(frozen=True)
class MAEConfig:
    """Shape of a masked autoencoder; the defaults are the paper's ViT-B/16.

    Raises:
        ValueError: a value is out of range, or values contradict each other.
    """

    image_size: tuple[int, int] = (224, 224)
    """Height and width in pixels."""
    patch_size: int = VIT_B16.patch_size
    """Side of a square patch in pixels."""
    in_chans: int = 3
    """Channels of the images; the loader gives 3."""
    dim: int = VIT_B16.dim
    """Width of the encoder's tokens."""
    depth: int = VIT_B16.depth
    """Blocks of the encoder."""
    heads: int = VIT_B16.heads
    """Attention heads of each encoder block."""
    mlp_ratio: float = 4.0
    """Width of a block's hidden layer divided by the width of its tokens."""
    decoder_dim: int = 512
    """Width of the decoder's tokens."""
    decoder_depth: int = 8
    """Blocks of the decoder (paper, table 1a)."""
    decoder_heads: int = 16
    """Attention heads of each decoder block."""
    mask_ratio: float = 0.75
    """Share of patches that are removed; with 0 there is no loss, only `MAE.encode`."""
    mask: MaskKind = "random"
    """`block` removes blocks as BEiT does; `grid` keeps one patch of each 2 x 2 cell (paper, table 1f)."""
    encoder_mask_tokens: bool = False
    """The encoder sees all positions, with its own mask token at each removed patch; the decoder then adds no tokens
    (paper, table 1c)."""
    target: Target = "normalised_pixel"
    """What is predicted for each patch (paper, table 1d); pca and token need `target_file`."""
    components: int = 96
    """Number of coefficients per patch for the target "pca"."""
    codes: int = 8192
    """Size of the tokenizer's codebook for the target "token"."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Per channel, subtracted from pixels scaled to 0..1."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Per channel, divides pixels after the mean is subtracted."""
    attention: AttentionKind = "auto"
    """`auto` means `math` in bf16 on a CPU and `sdpa` otherwise."""

    def __post_init__(self) -> None:
        _check_positive(self, "decoder_dim", "decoder_depth", "decoder_heads")
        if any(side % self.patch_size for side in self.image_size):
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        for name, dim, heads in (("", self.dim, self.heads), ("decoder_", self.decoder_dim, self.decoder_heads)):
            if dim % heads:
                raise ValueError(f"{name}heads {heads} does not divide {name}dim {dim}")
            if dim % 4:
                raise ValueError(f"{name}dim {dim} is not divisible by 4 (sine and cosine of row and column)")
            if (dim * self.mlp_ratio) % 1 or self.mlp_ratio <= 0:
                raise ValueError(f"mlp_ratio {self.mlp_ratio} of {name}dim {dim} is not a whole number of units")
        if self.target not in get_args(Target):
            raise ValueError(f"target {self.target!r} is not one of {', '.join(get_args(Target))}")
        if self.attention not in get_args(AttentionKind):
            raise ValueError(f"attention {self.attention!r} is not one of {', '.join(get_args(AttentionKind))}")
        if self.target == "normalised_pixel" and self.patch_dim == 1:
            raise ValueError("a patch of one number has no spread to normalise by; use target pixel")
        if self.target == "pca" and not 1 <= self.components <= self.patch_dim:
            raise ValueError(f"components {self.components} is not in 1..{self.patch_dim}, the size of a patch")
        if self.target == "token" and self.codes < 2:
            raise ValueError(f"codes {self.codes} must be at least 2")
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"mask_ratio {self.mask_ratio} is not in [0, 1)")
        if not self.keep:
            raise ValueError(f"mask_ratio {self.mask_ratio} of {self.num_patches} patches leaves no patch visible")
        if self.mask not in get_args(MaskKind):
            raise ValueError(f"mask {self.mask!r} is not one of {', '.join(get_args(MaskKind))}")
        if self.mask == "grid":
            check_grid_mask(self.grid, self.keep)
        if not len(self.mean) == len(self.std) == self.in_chans:
            raise ValueError(f"mean {self.mean} and std {self.std} must have in_chans = {self.in_chans} values each")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be positive")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def patch_dim(self) -> int:
        """Numbers per patch: pixels x channels."""
        return self.patch_size**2 * self.in_chans

    @property
    def target_dim(self) -> int:
        """Numbers that the decoder predicts per patch."""
        return {"pca": self.components, "token": self.codes}.get(self.target, self.patch_dim)

    @property
    def keep(self) -> int:
        """Number of visible patches."""
        return keep_count(self.num_patches, self.mask_ratio)


@dataclass(frozen=True)
class ClassifierConfig:
    """Shape of a ViT classifier; the defaults are the paper's ViT-B/16 for fine-tuning.

    Raises:
        ValueError: a value is out of range, or values contradict each other.
    """

    classes: int = 1000
    """Number of classes; by default that of the training data."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width in pixels; may differ from pre-training."""
    patch_size: int = VIT_B16.patch_size
    """Side of a square patch in pixels."""
    in_chans: int = 3
    """Channels of the images; the loader gives 3."""
    dim: int = VIT_B16.dim
    """Width of the encoder's tokens."""
    depth: int = VIT_B16.depth
    """Blocks of the encoder."""
    heads: int = VIT_B16.heads
    """Attention heads of each encoder block."""
    mlp_ratio: float = 4.0
    """Width of a block's hidden layer divided by the width of its tokens."""
    pool: Pool = "mean"
    """`mean` averages the patch tokens, followed by a new LayerNorm (`fc_norm`); `class_token` uses the class token
    after the final norm."""
    drop_path: float = 0.1
    """Stochastic depth rate of the last block; it grows linearly from 0 at the first block."""

    def __post_init__(self) -> None:
        _check_positive(self, "classes")
        if any(side % self.patch_size for side in self.image_size):
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        if self.dim % self.heads:
            raise ValueError(f"heads {self.heads} does not divide dim {self.dim}")
        if self.pool not in get_args(Pool):
            raise ValueError(f"pool {self.pool!r} is not one of {', '.join(get_args(Pool))}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path {self.drop_path} is not in [0, 1)")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


def keep_count(num_patches: int, mask_ratio: float) -> int:
    """Number of visible patches, truncated in floating point as in the reference: 100 patches at 0.9 keep 9."""
    return int(num_patches * (1 - mask_ratio))


def check_grid_mask(grid: tuple[int, int], keep: int) -> None:
    """Raise ValueError unless `grid` divides into 2 x 2 cells and `keep` is one patch per cell."""
    if grid[0] % 2 or grid[1] % 2:
        raise ValueError(f"mask grid keeps one patch per 2 x 2 cell; {grid[0]} x {grid[1]} patches have an odd side")
    if keep * 4 != grid[0] * grid[1]:
        raise ValueError(
            f"mask grid keeps a quarter of {grid[0] * grid[1]} patches, not {keep}; set mask_ratio to 0.75"
        )


def _check_positive(config: "MAEConfig | ClassifierConfig", *names: str) -> None:
    """Raises ValueError unless the encoder's sizes and the fields `names` are at least 1."""
    for name in ("patch_size", "in_chans", "dim", "depth", "heads", *names):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} {getattr(config, name)} must be at least 1")
    if min(config.image_size) < 1:
        raise ValueError(f"image_size {config.image_size} must be at least 1")
