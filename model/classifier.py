"""ViT classifiers for fine-tuning and linear probing (paper, section 4.1 and appendix A), on timm's VisionTransformer.

Fine-tuning takes the mean of the patch tokens and a fresh LayerNorm, so the pre-trained final norm is dropped, or the
class token behind that norm. Linear probing freezes everything but a BatchNorm without affine and a linear layer.
"""

from collections.abc import Callable, Mapping

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maelstream.model.config import ClassifierConfig
from maelstream.model.formats import encoder_of
from maelstream.model.position import interpolate_table
from maelstream.model.transformer import initialise, layer_norm


def build_classifier(config: ClassifierConfig, seed: int = 0) -> VisionTransformer:
    """timm's ViT, freshly drawn: normalised float images (B, C, H, W) in, logits (B, classes) out.

    Its position table is a parameter and is trained. The weights are a function of `seed` and their names, as MAE's:
    normal with deviation 0.02 (cut at +-2, as the reference's truncated normal is), the head's 2e-5, so that the first
    logits are nearly equal; biases 0, LayerNorm scales 1.
    """
    device = torch.get_default_device()
    with torch.device("meta"):  # timm's own initialisation neither costs time nor moves torch's generator
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
    initialise(model, seed, _draw)
    return model


def encoder_weights(mae: Mapping[str, Tensor], config: ClassifierConfig, grid: tuple[int, int]) -> dict[str, Tensor]:
    """What a classifier starts from: the encoder of MAE weights under the reference's names, trained on `grid`.

    The position table is interpolated to the classifier's grid, and with the mean as pool the final norm is dropped.

    Raises:
        ValueError: a position table that is not of `grid`.
    """
    weights = encoder_of(mae)
    if config.pool == "mean":
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("norm.")}
    return weights | {"pos_embed": interpolate_table(weights["pos_embed"], grid, config.grid)}


def fresh_parameters(config: ClassifierConfig) -> set[str]:
    """Names of the parameters that MAE weights do not hold: the head's, and those of the norm behind the mean."""
    fresh = {"head.weight", "head.bias"}
    return fresh | {"fc_norm.weight", "fc_norm.bias"} if config.pool == "mean" else fresh


class FeatureNorm(nn.BatchNorm1d):
    """BatchNorm without affine over the batch of all ranks, in float32 whatever the features are.

    torch's own synchronised one runs on GPUs alone. `summed` adds a tensor up over ranks, the same on each.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        super().__init__(dim, eps=1e-6, affine=False, device=device)
        self.summed: Callable[[Tensor], Tensor] | None = None

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) in any float dtype, without gradient, to (B, D) in the same."""
        values = features.float()
        if not self.training or self.summed is None:
            return super().forward(values).to(features.dtype)
        count = values.new_tensor([len(values)])
        total = self.summed(torch.cat([values.sum(0), count]))
        mean, count = total[:-1] / total[-1], total[-1]
        variance = self.summed((values - mean).square().sum(0)) / count
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), self.momentum)
        return ((values - mean) / (variance + self.eps).sqrt()).to(features.dtype)


class SideBySide(nn.ModuleList):
    """Linear layers on the same features: (B, D) to (layers, B, classes)."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([layer(features) for layer in self])


def make_linear_probe(model: VisionTransformer, seed: int = 0, heads: int = 1) -> None:
    """Freeze all of a classifier but a fresh head: BatchNorm without affine (eps 1e-6), then linear (normal 0.01).

    Several `heads` behind the one BatchNorm begin alike, and make the logits (heads, B, classes).

    Raises:
        ValueError: a classifier with stochastic depth, which would blur the features that are probed.
    """
    if rate := drop_path_rates(model)[-1]:
        raise ValueError(f"a linear probe reads exact features: build the classifier with drop_path 0, not {rate}")
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
    head = layers[0] if heads == 1 else SideBySide(layers)
    model.head = nn.Sequential(FeatureNorm(layers[0].in_features, device), head)


def train_last_blocks(model: VisionTransformer, count: float) -> None:
    """Freeze all but the last `count` blocks, the norm behind them and the head (paper, figure 9).

    0.5 is the MLP of the last block with its norm; 0 the head alone.

    Raises:
        ValueError: more blocks than there are, or a part of one other than half the last.
    """
    depth = len(model.blocks)
    if count != 0.5 and (count % 1 or not 0 <= count <= depth):
        raise ValueError(f"{count:g} blocks: it must be 0, 0.5 or a whole number up to {depth}")
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
    """Probability that each block's residual branches are dropped in training."""
    return [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]


def _draw(name: str, weights: Tensor, generator: torch.Generator) -> None:
    if weights.ndim > 1:
        nn.init.trunc_normal_(weights, std=2e-5 if name == "head.weight" else 0.02, generator=generator)
    else:
        weights.fill_(0 if name.endswith("bias") else 1)
