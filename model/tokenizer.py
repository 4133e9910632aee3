"""A discrete VAE, from images to a grid of codes and back (DALL-E: Ramesh et al. 2021, arXiv 2102.12092, appendix A).

Architecture, names and shapes are those of the published DALL-E encoder and decoder: four groups of residual
bottleneck blocks. Between groups, height and width are halved or doubled, so one code covers 8 x 8 pixels. Pixels are
mapped from 0..1 to 0.1..0.9, where the logit-Laplace likelihood of the reconstruction is finite.
"""

import math
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.nn import functional as F

DOWNSAMPLE = 8
_GROUPS = 4
_EPS = 0.1  # margin of `map_pixels`
_INPUT, _OUTPUT = "blocks.input.w", "blocks.output.conv.w"


@dataclass(frozen=True)
class TokenizerConfig:
    """Shape of the encoder and of its decoder; the defaults are those of DALL-E.

    Raises:
        ValueError: a value is out of range.
    """

    codes: int = 8192
    hidden: int = 256
    """Channels of the first group; each following group has twice as many."""
    in_chans: int = 3
    blocks: int = 2
    """Blocks per group."""

    def __post_init__(self) -> None:
        if self.codes < 2 or min(self.in_chans, self.blocks) < 1:
            raise ValueError(
                f"codes {self.codes} must be at least 2, in_chans {self.in_chans} and blocks {self.blocks} at least 1"
            )
        if self.hidden < 4 or self.hidden % 4:
            raise ValueError(
                f"hidden {self.hidden} is not a multiple of 4 (bottlenecks have a quarter of the channels)"
            )

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor]) -> "TokenizerConfig":
        """The configuration of the encoder with these weights; ValueError if they are not those of a DALL-E encoder."""
        if missing := [name for name in (_INPUT, _OUTPUT) if name not in weights]:
            raise ValueError(f"not a DALL-E encoder: it has no {' and no '.join(missing)}")
        (hidden, in_chans), codes = weights[_INPUT].shape[:2], weights[_OUTPUT].shape[0]
        blocks = len({name.split(".")[2] for name in weights if name.startswith("blocks.group_1.block_")})
        return cls(codes, hidden, in_chans, blocks)


class Conv(nn.Module):
    """A convolution that keeps height and width."""

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(outputs, inputs, size, size))
        self.b = nn.Parameter(torch.empty(outputs))

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    """A residual bottleneck of four convolutions; its residual branch is scaled by 1 / layers^2."""

    def __init__(self, inputs: int, outputs: int, sizes: tuple[int, int, int, int], layers: int) -> None:
        super().__init__()
        self.gain = 1 / layers**2
        self.id_path = Conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        widths = (inputs, *[outputs // 4] * 3, outputs)
        path: OrderedDict[str, nn.Module] = OrderedDict()
        for number, size in enumerate(sizes, 1):
            path[f"relu_{number}"] = nn.ReLU()
            path[f"conv_{number}"] = Conv(widths[number - 1], widths[number], size)
        self.res_path = nn.Sequential(path)

    def forward(self, images: Tensor) -> Tensor:
        return self.id_path(images) + self.gain * self.res_path(images)


class Encoder(nn.Module):
    """Computes logits of the code at each grid position from mapped images; its `state_dict` has DALL-E's names."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.hidden * 2**group for group in range(_GROUPS)]
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=Conv(config.in_chans, config.hidden, 7))
        layers |= _groups(config.hidden, widths, config.blocks, (3, 3, 3, 1), "pool", lambda: nn.MaxPool2d(2))
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv(widths[-1], config.codes, 1)))
        self.blocks = nn.Sequential(layers)

    def forward(self, mapped: Float[Tensor, "b c h w"]) -> Float[Tensor, "b codes h/8 w/8"]:
        """`mapped` comes from `map_pixels`; height and width are multiples of 8."""
        return self.blocks(mapped)

    def flops(self, height: int, width: int) -> int:
        """Floating-point operations per image, counted as in model/flops.py."""
        total, area = 0, height * width
        for group in self.blocks.children():
            total += 2 * area * sum(conv.w.numel() for conv in group.modules() if isinstance(conv, Conv))
            if any(isinstance(layer, nn.MaxPool2d) for layer in group.modules()):
                area //= 4
        return total


class Decoder(nn.Module):
    """Computes location and log-scale of a Laplace distribution for each pixel, from one-hot or relaxed codes."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.hidden * 2**group for group in reversed(range(_GROUPS))]
        first = config.hidden // 2
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=Conv(config.codes, first, 1))
        layers |= _groups(
            first, widths, config.blocks, (1, 3, 3, 3), "upsample", lambda: nn.Upsample(scale_factor=2, mode="nearest")
        )
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv(widths[-1], 2 * config.in_chans, 1)))
        self.blocks = nn.Sequential(layers)

    def forward(self, codes: Float[Tensor, "b codes gh gw"]) -> Float[Tensor, "b 2*c 8*gh 8*gw"]:
        return self.blocks(codes)


def _groups(
    inputs: int,
    widths: list[int],
    blocks: int,
    sizes: tuple[int, int, int, int],
    between_name: str,
    between: Callable[[], nn.Module],
) -> OrderedDict[str, nn.Module]:
    """Groups of `blocks` blocks each; a resizing layer follows each group except the last."""
    groups: OrderedDict[str, nn.Module] = OrderedDict()
    for number, width in enumerate(widths, 1):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for block in range(1, blocks + 1):
            layers[f"block_{block}"] = Block(inputs, width, sizes, len(widths) * blocks)
            inputs = width
        if number < len(widths):
            layers[between_name] = between()
        groups[f"group_{number}"] = nn.Sequential(layers)
    return groups


def map_pixels(levels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Map pixels from 0..1 to 0.1..0.9."""
    return (1 - 2 * _EPS) * levels + _EPS


def median_pixels(statistics: Float[Tensor, "b 2*c h w"]) -> Float[Tensor, "b c h w"]:
    """Medians of a decoder's pixel distributions, as pixels in 0..1."""
    mapped = statistics.chunk(2, dim=1)[0].sigmoid()  # (B, C, H, W)
    return ((mapped - _EPS) / (1 - 2 * _EPS)).clamp(0, 1)


def resize_to_grid(levels: Float[Tensor, "b c h w"], grid: tuple[int, int]) -> Float[Tensor, "b c 8*gh 8*gw"]:
    """Resize images in 0..1 so that there is one code per position of `grid` (rows, columns)."""
    size = (grid[0] * DOWNSAMPLE, grid[1] * DOWNSAMPLE)
    return F.interpolate(levels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Draw weights in place from `seed` and their names: normal, standard deviation 1 / sqrt(inputs); biases are 0."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.zero_()
            continue
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        draw = torch.empty(parameter.shape, device="cpu").normal_(generator=generator)
        parameter.copy_(draw / math.sqrt(parameter[0].numel()))


class Loss(NamedTuple):
    """Loss of a discrete VAE and its parts, each averaged over the batch."""

    total: Float32[Tensor, ""]
    reconstruction: Float32[Tensor, ""]
    """Negative log-likelihood (logit-Laplace) per pixel and channel."""
    divergence: Float32[Tensor, ""]
    """KL divergence of the code distribution from the uniform one, in nats per code."""
    codes: Int64[Tensor, "b gh*gw"]
    """The most likely code at each position."""


def vae_loss(
    encoder: Encoder,
    decoder: Decoder,
    levels: Float32[Tensor, "b c h w"],
    temperature: float,
    divergence_weight: float,
    generator: torch.Generator,
) -> Loss:
    """Loss of images in 0..1, with codes drawn from their Gumbel-softmax relaxation (Jang et al. 2016).

    `divergence_weight` is DALL-E's beta: (reconstruction + beta x divergence) of an image, per pixel and channel.
    """
    mapped = map_pixels(levels)
    log_shares = encoder(mapped).log_softmax(1)  # (B, V, gh, gw)
    noise = -torch.empty_like(log_shares).exponential_(generator=generator).log()
    statistics = decoder(((log_shares + noise) / temperature).softmax(1))  # (B, 2C, H, W)
    location, log_scale = statistics.chunk(2, dim=1)
    distance = (mapped.logit() - location).abs() * (-log_scale).exp()
    reconstruction = (distance + log_scale + math.log(2) + mapped.log() + (1 - mapped).log()).mean()
    divergence = math.log(encoder.config.codes) + (log_shares.exp() * log_shares).sum(1).mean()
    weight = divergence_weight / (encoder.config.in_chans * DOWNSAMPLE**2)
    codes = log_shares.detach().argmax(1).flatten(1)
    return Loss(reconstruction + weight * divergence, reconstruction, divergence, codes)
