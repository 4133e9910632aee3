"""ViT classifiers for fine-tuning and linear probing (paper, section 4.1 and appendix A), on timm's VisionTransformer.

Fine-tuning classifies the mean of the patch tokens after a new LayerNorm, which replaces the pre-trained final norm, or
the class token after the pre-trained norm. Linear probing trains only a linear layer after a BatchNorm without affine.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maelstream.model.config import ClassifierConfig
from maelstream.model.formats import without_decoder
from maelstream.model.position import interpolate_table
from maelstream.model.transformer import initialise, layer_norm


def build_classifier(config: ClassifierConfig, seed: int = 0, head_std: float = 2e-5) -> VisionTransformer:
    """timm's ViT with new weights: normalised float images (B, C, H, W) in, logits (B, classes) out.

    The position table is a trained parameter. Weights depend on `seed` and their names, as in `MAE`. They are normal
    with standard deviation 0.02 (truncated at +-2, as in the reference), those of the head with `head_std`: 2e-5 on a
    trained encoder, so that the first logits are nearly equal, and 0.02 as everywhere when training from scratch (timm,
    and the reference without weights). Biases are 0, LayerNorm scales are 1.
    """
    device = torch.get_default_device()
    with torch.device("meta"):  # so timm's initialisation costs no time and does not advance torch's random generator
        model = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            in_chans=config.in_chans,
            num_classes=config.classes,
            global_pool="avg" if config.pool == "mean" else "token",
            embed_dim=config.dim,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            drop_path_rate=config.drop_path,
            norm_layer=layer_norm,
            weight_init="skip",
        )
    model.to_empty(device=device)
    initialise(model, seed, partial(_draw, head_std=head_std))
    return model


def encoder_weights(mae: Mapping[str, Tensor], config: ClassifierConfig, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Initial weights of a classifier: the encoder of MAE weights (reference names) that were trained on `grid`.

    The position table is interpolated to the classifier's grid. With `pool="mean"` the final norm is dropped.

    Raises:
        ValueError: the position table does not have the size of `grid`.
    """
    weights = without_decoder(mae)
    if config.pool == "mean":
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("norm.")}
    return weights | {"pos_embed": interpolate_table(weights["pos_embed"], grid, config.grid)}


def fresh_parameters(config: ClassifierConfig) -> set[str]:
    """Names of the parameters that MAE weights lack: the head and, with `pool="mean"`, the norm after the mean."""
    fresh = {"head.weight", "head.bias"}
    return fresh | {"fc_norm.weight", "fc_norm.bias"} if config.pool == "mean" else fresh


class FeatureNorm(nn.BatchNorm1d):
    """BatchNorm without affine over the batch of all ranks, always computed in float32.

    torch's SyncBatchNorm runs on GPUs only. `sum_over_ranks` returns the sum of a tensor over all ranks, on each rank.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        super().__init__(dim, eps=1e-6, affine=False, device=device)
        self.sum_over_ranks: Callable[[Tensor], Tensor] | None = None

    def forward(self, features: Tensor) -> Tensor:
        """Normalise features (B, D) of any float dtype; the result has the same dtype and no gradient."""
        values = features.float()
        if not self.training or self.sum_over_ranks is None:
            return super().forward(values).to(features.dtype)
        count = values.new_tensor([len(values)])
        total = self.sum_over_ranks(torch.cat([values.sum(0), count]))
        mean, count = total[:-1] / total[-1], total[-1]
        variance = self.sum_over_ranks((values - mean).square().sum(0)) / count
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), self.momentum)
        return ((values - mean) / (variance + self.eps).sqrt()).to(features.dtype)


class ParallelLinear(nn.ModuleList):
    """Linear layers that share their input: (B, D) to (layers, B, classes)."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([layer(features) for layer in self])


def make_linear_probe(model: VisionTransformer, seed: int = 0, heads: int = 1) -> None:
    """Freeze a classifier and give it a new head: BatchNorm without affine (eps 1e-6), then linear (normal, std 0.01).

    Several `heads` share the BatchNorm and start from equal weights; the logits are then (heads, B, classes).

    Raises:
        ValueError: the classifier has stochastic depth, which would add noise to the probed features.
    """
    if rate := drop_path_rates(model)[-1]:
        raise ValueError(f"a linear probe needs exact features: build the classifier with drop_path 0, not {rate}")
    model.requires_grad_(False)
    device = model.head.weight.device
    start = torch.empty(model.head.weight.shape, device="cpu")
    start.normal_(std=0.01, generator=torch.Generator("cpu").manual_seed(seed))
    layers = []
    for _ in range(heads):
        layers.append(nn.Linear(model.head.in_features, model.head.out_features, device=device))
        with torch.no_grad():
            layers[-1].weight.copy_(start)
            layers[-1].bias.zero_()
    head = layers[0] if heads == 1 else ParallelLinear(layers)
    model.head = nn.Sequential(FeatureNorm(layers[0].in_features, device), head)


def train_last_blocks(model: VisionTransformer, count: float) -> None:
    """Freeze all but the last `count` blocks, the norm after them and the head (paper, figure 9).

    0.5 means the MLP of the last block and its norm; 0 means the head alone.

    Raises:
        ValueError: `count` is neither 0.5 nor a whole number up to the number of blocks.
    """
    depth = len(model.blocks)
    if count != 0.5 and (count % 1 or not 0 <= count <= depth):
        raise ValueError(f"cannot train the last {count:g} blocks; use 0, 0.5 or a whole number up to {depth}")
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    if count == 0.5:
        model.blocks[-1].norm2.requires_grad_(True)
        model.blocks[-1].mlp.requires_grad_(True)
    for block in list(model.blocks)[depth - int(count) :] if count >= 1 else []:
        block.requires_grad_(True)
    if count:
        model.norm.requires_grad_(True)
        model.fc_norm.requires_grad_(True)


def drop_path_rates(model: VisionTransformer) -> list[float]:
    """Probability, for each block, that its residual branches are dropped in training."""
    return [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]


def _draw(name: str, weights: Tensor, generator: torch.Generator, head_std: float) -> None:
    if weights.ndim > 1:
        nn.init.trunc_normal_(weights, std=head_std if name == "head.weight" else 0.02, generator=generator)
    else:
        weights.fill_(0 if name.endswith("bias") else 1)
