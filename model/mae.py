"""The masked autoencoder (He et al. 2021, arXiv 2111.06377): images and mask keys in, loss out.

The encoder sees only the kept patches, which are gathered before they are embedded. The decoder sees all positions in
the order (kept, removed), with a mask token at each removed patch. Attention does not depend on the order, because the
position embeddings are gathered in the same order. The removed patches come last; the prediction head runs on them
alone. Parameter names and shapes are those of the published checkpoints.
"""

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from maelstream.model.config import MAEConfig
from maelstream.model.masking import Mask, draw_mask, gather_patches
from maelstream.model.patches import denormalise, normalise, patchify, unpatchify
from maelstream.model.position import sincos_table
from maelstream.model.targets import PCATarget, PixelTarget, ReconstructionTarget, TokenTarget
from maelstream.model.transformer import (
    PatchProjection,
    blocks,
    choose_attention,
    initialise,
    layer_norm,
)


class Reconstruction(NamedTuple):
    """Images in 0..1 for display, and their loss."""

    original: Float32[Tensor, "b c h w"]
    masked: Float32[Tensor, "b c h w"]
    """Removed patches are mid-grey."""
    reconstructed: Float32[Tensor, "b c h w"]
    """All patches as predicted. Visible patches look bad, because the loss ignores them."""
    reconstructed_with_visible: Float32[Tensor, "b c h w"]
    """Removed patches as predicted, visible patches from the original."""
    loss: Float[Tensor, ""]


def position_tables(config: MAEConfig) -> dict[str, Float32[Tensor, "1 1+l d"]]:
    """The two fixed position tables under their state_dict keys, exact in float32.

    An export of a model that was cast to bf16 writes these: the cast keeps only 8 bits of each entry (docs/model.md).
    """
    return {
        "pos_embed": sincos_table(config.grid, config.dim),
        "decoder_pos_embed": sincos_table(config.grid, config.decoder_dim),
    }


class MAE(nn.Module):
    """Encoder, decoder and loss; `state_dict` has the keys and shapes of the published `*_full.pth` checkpoints.

    The weights depend only on `seed`. They are drawn on the CPU for every default device except the meta device, where
    nothing is drawn. The targets "pca" and "token" need a frozen `target`; without it there is no loss, only `encode`.

    Raises:
        ValueError: `target` has another kind or size than the configuration.
    """

    pos_embed: Float[Tensor, "1 1+l d"]
    decoder_pos_embed: Float[Tensor, "1 1+l d2"]
    activation_checkpointing: bool = False
    """Keep only the input of each block and recompute the rest in the backward pass; results are bit-identical."""

    def __init__(self, config: MAEConfig, seed: int = 0, target: PCATarget | TokenTarget | None = None) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        # On the meta device, timm's initialisation costs no time and does not advance torch's random generator.
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
        # Buffers, not frozen parameters: DDP rejects parameters without a gradient (lightly#1775).
        for name, table in position_tables(config).items():
            self.register_buffer(name, table.to(device))
        self.target = _checked_target(config, target)
        if self.target is not None:
            self.target.to(device)

    def forward(self, images: UInt8[Tensor, "b c h w"], keys: Int64[Tensor, "b"]) -> Float[Tensor, ""]:
        """Error over the removed patches of the whole batch, in float32 (float64 for a float64 model).

        Raises:
            ValueError: the images do not have the configured shape, or are not uint8; or the mask removes no patch.
        """
        self._check_images(images)
        return self.loss(normalise(images, self.config.mean, self.config.std), self._mask(keys))

    def loss(self, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, ""]:
        """Loss of normalised images under a given mask, in the dtype of `images`: float32 or float64."""
        patches = patchify(images, self.config.patch_size)  # (B, L, P*P*C)
        latent = self.encode_masked(patches, mask)  # (B, 1+K, D)
        decoded = self._decode_in_order(latent, torch.cat([mask.kept, mask.removed], dim=1))  # (B, L, D')
        prediction = self.predict(decoded[:, mask.kept.shape[1] :])  # (B, R, T)
        return self._error(prediction, images, gather_patches(patches, mask.removed), mask.removed)

    def encode(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b 1+l d"]:
        """Features of unmasked images: the class token first, then the patches in row-major order.

        Raises:
            ValueError: the images do not have the configured shape, or are not uint8.
        """
        self._check_images(images)
        patches = patchify(normalise(images, self.config.mean, self.config.std), self.config.patch_size)
        indices = torch.arange(self.config.num_patches, device=images.device).expand(len(images), -1)  # (B, L)
        return self.encode_patches(patches, indices)

    @torch.no_grad()
    def reconstruct(self, images: UInt8[Tensor, "b c h w"], keys: Int64[Tensor, "b"]) -> Reconstruction:
        """Reconstructions of `images` under the masks of `keys`, as in figures 2 to 4 of the paper.

        With the normalised target, each predicted patch gets the mean and standard deviation of the original patch (see
        `predicted_pixels` in model/patches.py). Coefficients and tokens are decoded to pixels.

        Raises:
            ValueError: as for `forward`, or the target's tokenizer has no decoder.
        """
        self._check_images(images)
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
            loss=self._error(
                gather_patches(prediction, mask.removed),
                normalised,
                gather_patches(patches, mask.removed),
                mask.removed,
            ),
        )

    def encode_masked(self, patches: Float[Tensor, "b l ppc"], mask: Mask) -> Float[Tensor, "b 1+k d"]:
        """Latent of masked images for `decode`: the class token, then the kept patches in the order of `mask.kept`.

        With `encoder_mask_tokens` the removed patches follow: (B, 1+L, D).
        """
        return self.encode_patches(
            gather_patches(patches, mask.kept), mask.kept, mask.removed if self.config.encoder_mask_tokens else None
        )

    def encode_patches(
        self,
        patches: Float[Tensor, "b n ppc"],
        indices: Int64[Tensor, "b n"],
        masked: Int64[Tensor, "b r"] | None = None,
    ) -> Float[Tensor, "b 1+n d"]:
        """Latent of the class token and of normalised `patches`, whose positions in the grid are `indices`.

        With `encoder_mask_tokens`, a mask token for each position in `masked` follows the patches.
        """
        # DeepSpeed's bf16 casts parameters but not buffers, so the dtype of the model is that of its parameters.
        table = self.pos_embed[0].to(self.cls_token.dtype)  # (1+L, D)
        tokens = self.patch_embed(patches) + F.embedding(indices + 1, table)  # (B, N, D)
        cls_token = (self.cls_token + table[0]).expand(len(tokens), -1, -1)  # (B, 1, D)
        parts = [cls_token, tokens]
        if masked is not None:
            parts.append(self.encoder_mask_token + F.embedding(masked + 1, table))  # (B, R, D)
        return self.norm(self._run_blocks(self.blocks, torch.cat(parts, dim=1)))  # (B, 1+N(+R), D)

    def decode(self, latent: Float[Tensor, "b 1+k d"], restore: Int64[Tensor, "b l"]) -> Float[Tensor, "b l d2"]:
        """Decoder features of all patches in row-major order; a mask token replaces each removed patch."""
        order = restore.argsort(dim=1)  # (B, L): the inverse permutation, kept patches first
        return gather_patches(self._decode_in_order(latent, order), restore)  # (B, L, D')

    def _decode_in_order(
        self, latent: Float[Tensor, "b 1+k d"], order: Int64[Tensor, "b l"]
    ) -> Float[Tensor, "b l d2"]:
        """Decoder features of the patches in `order`: the kept ones (those in `latent`), then the removed ones."""
        embedded = self.decoder_embed(latent)  # (B, 1+K, D')
        table = self.decoder_pos_embed[0].to(self.cls_token.dtype)  # (1+L, D')
        positions = F.embedding(F.pad(order + 1, (1, 0)), table)  # (B, 1+L, D'); row 0 is the class token's
        embedded_count = embedded.shape[1]
        tokens = embedded + positions[:, :embedded_count]
        if embedded_count < positions.shape[1]:  # the encoder added no mask tokens
            tokens = torch.cat([tokens, self.mask_token + positions[:, embedded_count:]], dim=1)  # (B, 1+L, D')
        return self._run_blocks(self.decoder_blocks, tokens)[:, 1:]  # (B, L, D')

    def _run_blocks(self, blocks: nn.Sequential, tokens: Tensor) -> Tensor:
        if not self.activation_checkpointing:
            return blocks(tokens)
        for block in blocks:  # blocks draw no random numbers, so the generator's state need not be kept
            tokens = checkpoint(block, tokens, use_reentrant=False, preserve_rng_state=False)
        return tokens

    def predict(self, decoded: Float[Tensor, "b n d2"]) -> Float[Tensor, "b n t"]:
        """Predicted target of each patch, from its decoder features."""
        return self.decoder_pred(self.decoder_norm(decoded))  # (B, N, T)

    def _error(self, prediction: Tensor, images: Tensor, patches: Tensor, indices: Tensor) -> Tensor:
        """Error against the target of `patches`, which are at `indices` in the grid of normalised `images`.

        The error has the dtype of the patches: the loss of a bf16 model is float32.
        """
        target = self._target()
        return target.error(prediction.to(patches.dtype), target.expected(images, patches, indices))

    def _target(self) -> ReconstructionTarget:
        if self.target is None:
            raise ValueError(f"target {self.config.target} has no loss without its tensors; pass `target` to MAE")
        return self.target

    def _mask(self, keys: Tensor) -> Mask:
        if self.config.keep == self.config.num_patches:
            raise ValueError(
                f"mask_ratio {self.config.mask_ratio} removes none of {self.config.num_patches} patches, so there is "
                "no loss; use encode() for features of unmasked images"
            )
        return draw_mask(self.config.mask, keys, self.config.grid, self.config.keep)

    def _check_images(self, images: Tensor) -> None:
        expected = (self.config.in_chans, *self.config.image_size)
        if images.dtype != torch.uint8 or images.shape[1:] != expected:
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; the model takes uint8 of shape (batch, "
                f"{', '.join(map(str, expected))}) and normalises them itself"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> "MAE":
        """Choose the attention kernel again after each move or cast."""
        super()._apply(fn, recurse)
        choose_attention(self, self.config.attention, self.cls_token.device)
        return self


def _checked_target(config: MAEConfig, target: PCATarget | TokenTarget | None) -> ReconstructionTarget | None:
    """The configured pixel target, or `target` itself; ValueError if `target` does not fit the configuration."""
    kind = {"pca": PCATarget, "token": TokenTarget}.get(config.target)
    if kind is None and target is None:
        return PixelTarget(config.target)
    if target is None:
        return None
    if kind is None or not isinstance(target, kind) or target.dim != config.target_dim:
        raise ValueError(
            f"{type(target).__name__} of size {target.dim} does not fit target {config.target} of size "
            f"{config.target_dim}"
        )
    return target
