"""The masked autoencoder (He et al. 2021, arXiv 2111.06377): images and mask keys in, loss out.

The encoder sees the kept patches alone; they are gathered before they are embedded. The decoder sees every place, with
a mask token where a patch was removed, in the order (kept, removed): attention does not mind, a table gathered by place
tells the places, and what is to be predicted is the last piece. The prediction head runs on that piece alone.
Parameter names and shapes are those of the published checkpoints.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from maelstream.model.masking import Mask, MaskKind, draw_mask, keep_count, refuse_grid_mask, take
from maelstream.model.patches import Target, denormalise, normalise, patchify, unpatchify
from maelstream.model.position import sincos_table
from maelstream.model.targets import PCATarget, PixelTarget, ReconstructionTarget, TokenTarget
from maelstream.model.transformer import (
    AttentionKind,
    PatchProjection,
    blocks,
    choose_attention,
    initialise,
    layer_norm,
)


@dataclass(frozen=True)
class MAEConfig:
    """Shape of a masked autoencoder; the defaults are the paper's ViT-B/16.

    Raises:
        ValueError: values that do not go together.
    """

    image_size: tuple[int, int] = (224, 224)
    """Height and width in pixels."""
    patch_size: int = 16
    in_chans: int = 3
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    mask_ratio: float = 0.75
    """Share of patches that is removed; 0 is an autoencoder without a loss, for `MAE.encode` alone."""
    mask: MaskKind = "random"
    """`block` removes BEiT's blocks, `grid` keeps one patch of each 2 x 2 (paper, table 1f)."""
    encoder_mask_tokens: bool = False
    """The encoder sees every place, with a mask token of its own where a patch was removed; the decoder then gets the
    encoder's output of every place and adds no tokens (paper, table 1c)."""
    target: Target = "normalised_pixel"
    components: int = 96
    """Coefficients that the target "pca" asks for."""
    codes: int = 8192
    """Codes that the target "token" tells apart."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    attention: AttentionKind = "auto"
    """`auto` is `sdpa` on CUDA and in float32, and `math` in bf16 on a CPU."""

    def __post_init__(self) -> None:
        sizes = (*self.image_size, self.patch_size, self.in_chans, self.dim, self.depth, self.heads)
        if min(*sizes, self.decoder_dim, self.decoder_depth, self.decoder_heads) < 1:
            raise ValueError(f"every size, depth and number of heads must be at least 1: {self}")
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
            raise ValueError(f"target {self.target!r} is none of {', '.join(get_args(Target))}")
        if self.attention not in get_args(AttentionKind):
            raise ValueError(f"attention {self.attention!r} is none of {', '.join(get_args(AttentionKind))}")
        if self.target == "normalised_pixel" and self.patch_dim == 1:
            raise ValueError("a patch of one number has no spread to be normalised by; take target pixel")
        if self.target == "pca" and not 1 <= self.components <= self.patch_dim:
            raise ValueError(f"components {self.components} is not in 1..{self.patch_dim}, the numbers in a patch")
        if self.target == "token" and self.codes < 2:
            raise ValueError(f"codes {self.codes} must be at least 2")
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"mask_ratio {self.mask_ratio} is not in [0, 1)")
        if not self.keep:
            raise ValueError(f"mask_ratio {self.mask_ratio} of {self.num_patches} patches leaves no patch visible")
        if self.mask not in get_args(MaskKind):
            raise ValueError(f"mask {self.mask!r} is none of {', '.join(get_args(MaskKind))}")
        if self.mask == "grid":
            refuse_grid_mask(self.grid, self.keep)
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
        """Numbers in one patch."""
        return self.patch_size**2 * self.in_chans

    @property
    def target_dim(self) -> int:
        """Numbers that the decoder predicts for a patch."""
        return {"pca": self.components, "token": self.codes}.get(self.target, self.patch_dim)

    @property
    def keep(self) -> int:
        """Patches that stay visible."""
        return keep_count(self.num_patches, self.mask_ratio)


class Reconstruction(NamedTuple):
    """Images in 0..1 to look at, and the loss they come with."""

    original: Float32[Tensor, "b c h w"]
    masked: Float32[Tensor, "b c h w"]
    """Removed patches in mid-grey."""
    reconstructed: Float32[Tensor, "b c h w"]
    """Every patch as predicted. Visible ones look bad: the loss never asks for them."""
    reconstructed_with_visible: Float32[Tensor, "b c h w"]
    """Removed patches as predicted, visible ones as they are."""
    loss: Float[Tensor, ""]


def position_tables(config: MAEConfig) -> dict[str, Float32[Tensor, "1 1+l d"]]:
    """The two frozen tables under their state_dict keys, exact in float32.

    An export of a model that was cast to bf16 writes these: the cast leaves 8 bits of each entry (docs/model.md).
    """
    return {
        "pos_embed": sincos_table(config.grid, config.dim),
        "decoder_pos_embed": sincos_table(config.grid, config.decoder_dim),
    }


class MAE(nn.Module):
    """Encoder, decoder and loss; `state_dict` has the keys and shapes of the published `*_full.pth` checkpoints.

    The weights are a function of `seed` alone, drawn on the CPU whatever the default device is; on the meta device
    nothing is drawn. The targets "pca" and "token" are given as a frozen `target`; without it there is no loss, only
    `encode`.

    Raises:
        ValueError: a `target` of another kind or size than the configuration's.
    """

    pos_embed: Float[Tensor, "1 1+l d"]
    decoder_pos_embed: Float[Tensor, "1 1+l d2"]
    activation_checkpointing: bool = False
    """Keep each block's input alone and compute the rest again in the backward pass; the numbers stay the same."""

    def __init__(self, config: MAEConfig, seed: int = 0, target: PCATarget | TokenTarget | None = None) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        # Built without memory first, so that timm's own initialisation neither costs time nor moves torch's generator.
        with torch.device("meta"):
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
            if config.encoder_mask_tokens:
                self.encoder_mask_token = nn.Parameter(torch.empty(1, 1, config.dim))
            else:
                self.mask_token = nn.Parameter(torch.empty(1, 1, config.decoder_dim))
            projection = PatchProjection(config.in_chans, config.dim, config.patch_size)
            self.patch_embed = nn.Sequential(OrderedDict(proj=projection))
            self.blocks = blocks(config.dim, config.depth, config.heads, config.mlp_ratio)
            self.norm = layer_norm(config.dim)
            self.decoder_embed = nn.Linear(config.dim, config.decoder_dim)
            self.decoder_blocks = blocks(
                config.decoder_dim, config.decoder_depth, config.decoder_heads, config.mlp_ratio
            )
            self.decoder_norm = layer_norm(config.decoder_dim)
            self.decoder_pred = nn.Linear(config.decoder_dim, config.target_dim)
        self.to_empty(device=device)
        initialise(self, seed)
        # Buffers, not frozen parameters: DDP complains of parameters without a gradient (lightly#1775).
        for name, table in position_tables(config).items():
            self.register_buffer(name, table.to(device))
        self.target = _checked(config, target)
        if self.target is not None:
            self.target.to(device)

    def forward(self, images: UInt8[Tensor, "b c h w"], keys: Int64[Tensor, "b"]) -> Float[Tensor, ""]:
        """Error over the removed patches of the whole batch, in float32 (float64 for a float64 model).

        Raises:
            ValueError: images of another shape or dtype than the configuration's, or a mask that removes no patch.
        """
        self._check(images)
        return self.loss(normalise(images, self.config.mean, self.config.std), self._mask(keys))

    def loss(self, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, ""]:
        """The loss of normalised images under a given mask, in the dtype of `images`: float32 or float64."""
        patches = patchify(images, self.config.patch_size)  # (B, L, P*P*C)
        latent = self.encode_masked(patches, mask)  # (B, 1+K, D)
        decoded = self._decode_in_order(latent, torch.cat([mask.kept, mask.removed], dim=1))  # (B, L, D')
        prediction = self.predict(decoded[:, mask.kept.shape[1] :])  # (B, R, T)
        return self._error(prediction, images, take(patches, mask.removed), mask.removed)

    def encode(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b 1+l d"]:
        """Features of whole images, nothing masked: class token first, then the patches in row-major order.

        Raises:
            ValueError: images of another shape or dtype than the configuration's.
        """
        self._check(images)
        patches = patchify(normalise(images, self.config.mean, self.config.std), self.config.patch_size)
        numbers = torch.arange(self.config.num_patches, device=images.device).expand(len(images), -1)  # (B, L)
        return self.encode_patches(patches, numbers)

    @torch.no_grad()
    def reconstruct(self, images: UInt8[Tensor, "b c h w"], keys: Int64[Tensor, "b"]) -> Reconstruction:
        """What the model makes of `images` under the masks of `keys`: figures 2 to 4 of the paper.

        Under the normalised target each patch is shown with the mean and spread of the true one (see `pixels_of` in
        model/patches.py), coefficients and tokens as the pixels that they stand for.

        Raises:
            ValueError: as `forward`, or tokens of a tokenizer without a decoder.
        """
        self._check(images)
        config, mask = self.config, self._mask(keys)
        normalised = normalise(images, config.mean, config.std)  # (B, C, H, W)
        patches = patchify(normalised, config.patch_size)  # (B, L, P*P*C)
        latent = self.encode_masked(patches, mask)  # (B, 1+K, D)
        prediction = self.predict(self.decode(latent, mask.restore))  # (B, L, T)
        pixels = self._target().pixels(prediction.to(patches.dtype), patches)  # (B, L, P*P*C)
        reconstructed = denormalise(unpatchify(pixels, config.patch_size, config.grid), config.mean, config.std)
        removed = (mask.restore >= config.keep)[:, :, None].expand_as(patches)  # (B, L, P*P*C)
        hidden = unpatchify(removed, config.patch_size, config.grid)  # (B, C, H, W)
        original = images.float() / 255
        return Reconstruction(
            original=original,
            masked=torch.where(hidden, 0.5, original),
            reconstructed=reconstructed,
            reconstructed_with_visible=torch.where(hidden, reconstructed, original),
            loss=self._error(take(prediction, mask.removed), normalised, take(patches, mask.removed), mask.removed),
        )

    def encode_masked(self, patches: Float[Tensor, "b l ppc"], mask: Mask) -> Float[Tensor, "b 1+k d"]:
        """Latent of masked images for `decode`: class token and kept patches, in the order of `mask.kept`.

        With `encoder_mask_tokens` it has every place, the removed ones last: (B, 1+L, D).
        """
        return self.encode_patches(
            take(patches, mask.kept), mask.kept, mask.removed if self.config.encoder_mask_tokens else None
        )

    def encode_patches(
        self,
        patches: Float[Tensor, "b n ppc"],
        numbers: Int64[Tensor, "b n"],
        masked: Int64[Tensor, "b r"] | None = None,
    ) -> Float[Tensor, "b 1+n d"]:
        """Latent of the class token and of `patches` (normalised), which stand at `numbers` of the grid.

        A model with `encoder_mask_tokens` also sees a mask token at each place of `masked`, after the patches.
        """
        # DeepSpeed's bf16 casts parameters and leaves buffers in float32: the parameters' dtype is the model's.
        table = self.pos_embed[0].to(self.cls_token.dtype)  # (1+L, D)
        tokens = self.patch_embed(patches) + F.embedding(numbers + 1, table)  # (B, N, D)
        cls_token = (self.cls_token + table[0]).expand(len(tokens), -1, -1)  # (B, 1, D)
        pieces = [cls_token, tokens]
        if masked is not None:
            pieces.append(self.encoder_mask_token + F.embedding(masked + 1, table))  # (B, R, D)
        return self.norm(self._through(self.blocks, torch.cat(pieces, dim=1)))  # (B, 1+N(+R), D)

    def decode(self, latent: Float[Tensor, "b 1+k d"], restore: Int64[Tensor, "b l"]) -> Float[Tensor, "b l d2"]:
        """Decoder features of every patch, in row-major order; a mask token stands in for each removed one."""
        order = restore.argsort(dim=1)  # (B, L): its inverse, kept patches first
        return take(self._decode_in_order(latent, order), restore)  # (B, L, D')

    def _decode_in_order(
        self, latent: Float[Tensor, "b 1+k d"], order: Int64[Tensor, "b l"]
    ) -> Float[Tensor, "b l d2"]:
        """Decoder features of the patches of `order`, the kept ones (those of `latent`) before the removed ones."""
        embedded = self.decoder_embed(latent)  # (B, 1+K, D')
        table = self.decoder_pos_embed[0].to(self.cls_token.dtype)  # (1+L, D')
        places = F.embedding(F.pad(order + 1, (1, 0)), table)  # (B, 1+L, D'); the class token's row is 0
        seen = embedded.shape[1]
        tokens = embedded + places[:, :seen]
        if seen < places.shape[1]:  # the encoder has not put mask tokens there
            tokens = torch.cat([tokens, self.mask_token + places[:, seen:]], dim=1)  # (B, 1+L, D')
        return self._through(self.decoder_blocks, tokens)[:, 1:]  # (B, L, D')

    def _through(self, blocks: nn.Sequential, tokens: Tensor) -> Tensor:
        if not self.activation_checkpointing:
            return blocks(tokens)
        for block in blocks:  # nothing in a block is random: no generator's state to keep
            tokens = checkpoint(block, tokens, use_reentrant=False, preserve_rng_state=False)
        return tokens

    def predict(self, decoded: Float[Tensor, "b n d2"]) -> Float[Tensor, "b n t"]:
        """Predicted target of each patch from its decoder features."""
        return self.decoder_pred(self.decoder_norm(decoded))  # (B, N, T)

    def _error(self, prediction: Tensor, images: Tensor, patches: Tensor, numbers: Tensor) -> Tensor:
        """Error against the target of `patches`, which stand at `numbers` of the grid of normalised `images`.

        In the dtype of the patches: a bf16 model's loss is float32.
        """
        target = self._target()
        return target.error(prediction.to(patches.dtype), target.of(images, patches, numbers))

    def _target(self) -> ReconstructionTarget:
        if self.target is None:
            raise ValueError(f"target {self.config.target} has no loss without its tensors; give MAE its `target`")
        return self.target

    def _mask(self, keys: Tensor) -> Mask:
        if self.config.keep == self.config.num_patches:
            raise ValueError(
                f"mask_ratio {self.config.mask_ratio} removes none of {self.config.num_patches} patches, so there is "
                "no loss; use encode() for features without a mask"
            )
        return draw_mask(self.config.mask, keys, self.config.grid, self.config.keep)

    def _check(self, images: Tensor) -> None:
        expected = (self.config.in_chans, *self.config.image_size)
        if images.dtype != torch.uint8 or images.shape[1:] != expected:
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; the model takes uint8 of shape (batch, "
                f"{', '.join(map(str, expected))}) and normalises them itself"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> "MAE":
        """Follow a move or a cast with the attention of that device and dtype."""
        super()._apply(fn, recurse)
        choose_attention(self, self.config.attention, self.cls_token.device)
        return self


def _checked(config: MAEConfig, target: PCATarget | TokenTarget | None) -> ReconstructionTarget | None:
    """The target of `config`, which is `target` unless it is one of pixels; ValueError when they do not go together."""
    kind = {"pca": PCATarget, "token": TokenTarget}.get(config.target)
    if kind is None and target is None:
        return PixelTarget(config.target)
    if target is None:
        return None
    if kind is None or not isinstance(target, kind) or target.dim != config.target_dim:
        raise ValueError(
            f"{type(target).__name__} of {target.dim} numbers is not the target {config.target} of {config.target_dim}"
        )
    return target
