"""The parts of a plain ViT (Dosovitskiy et al. 2021) as MAE uses them: blocks, patch projection, initialisation."""

import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

from maelstream.model.config import AttentionKind

layer_norm: Any = partial(nn.LayerNorm, eps=1e-6)  # torch's default, 1e-5, changes the loss of ViT-B by 1.6e-5


def blocks(dim: int, depth: int, heads: int, mlp_ratio: float) -> nn.Sequential:
    """`depth` pre-norm transformer blocks with biases and exact (erf) GELU; (B, N, dim) -> (B, N, dim)."""
    return nn.Sequential(*(Block(dim, heads, mlp_ratio, qkv_bias=True, norm_layer=layer_norm) for _ in range(depth)))


class PatchProjection(nn.Module):
    """Patch embedding of patches that are already cut out: the weights of a convolution, applied as a linear layer."""

    def __init__(self, in_chans: int, dim: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, in_chans, size, size))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, patches: Float[Tensor, "b n ppc"]) -> Float[Tensor, "b n d"]:
        """Embed patches from `patchify` (any float dtype); the result has the dtype of the weights, or of autocast."""
        # The kernel is stored (channel, row, column), a patch is (row, column, channel).
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P*P*C)
        return F.linear(patches.to(weight.dtype), weight, self.bias)  # (B, N, D)


def choose_attention(model: nn.Module, kind: AttentionKind, device: torch.device) -> None:
    """Set each attention layer of `model` to torch's fused kernel ("sdpa") or to plain matrix products ("math").

    "auto" means "math" for bf16 weights on a CPU, where the backward pass of the fused kernel is slower
    (docs/model.md), and "sdpa" otherwise.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            bf16_on_cpu = device.type == "cpu" and module.qkv.weight.dtype == torch.bfloat16
            module.fused_attn = not bf16_on_cpu if kind == "auto" else kind == "sdpa"


def draw_mae_weights(name: str, weights: Tensor, generator: torch.Generator) -> None:
    """Fill `weights` as the reference implementation does for pre-training (paper, appendix A.1).

    Matrices and patch kernels are Xavier uniform, where a kernel counts as a matrix (D, C*P*P). Tokens are normal with
    standard deviation 0.02, biases are 0, LayerNorm scales are 1.
    """
    if name.endswith("_token"):
        weights.normal_(std=0.02, generator=generator)
    elif weights.ndim > 1:
        fan_out, fan_in = weights.flatten(1).shape
        bound = math.sqrt(6 / (fan_in + fan_out))
        weights.uniform_(-bound, bound, generator=generator)
    else:
        weights.fill_(0 if name.endswith("bias") else 1)


@torch.no_grad()
def initialise(
    model: nn.Module, seed: int, draw: Callable[[str, Tensor, torch.Generator], None] = draw_mae_weights
) -> None:
    """Draw all parameters of a ViT in place with `draw` (name, float32 tensor to fill, generator).

    A parameter depends only on `seed`, its name and its shape, and is drawn on the CPU. So all ranks and devices start
    from the same weights, and models with different decoders start from the same encoder.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        weights = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        draw(name, weights, generator)
        parameter.copy_(weights)
