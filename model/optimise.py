"""Optimization: parameter groups with weight decay and layer-wise learning rates, the lr schedule, and LARS.

The paper (appendix A.1) uses AdamW for pre-training and fine-tuning, and LARS for linear probing.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for AdamW: first those without decay (biases and all other 1-D tensors), then the rest.

    Class and mask token are 3-D and decay, as in the reference implementation. Frozen parameters are left out.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    undecayed = {name for name, parameter in trained if parameter.ndim <= 1 or name.endswith(".bias")}
    return [
        {"params": [parameter for name, parameter in trained if name in undecayed], "weight_decay": 0.0},
        {"params": [parameter for name, parameter in trained if name not in undecayed], "weight_decay": weight_decay},
    ]


def layer_decay_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Parameter groups for fine-tuning a ViT: the lr of each layer is `layer_decay` times that of the layer above.

    The lowest layer is patch embedding, class token and position table; then come the blocks; the top layer is norm and
    head. The lr of a group is `lr_at(...)` x its `lr_scale`, which is 1 for the top layer. 1-D tensors, class token and
    position table have no weight decay. Frozen parameters are left out.
    """
    top = len(list(model.get_submodule("blocks").children())) + 1
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = _layer_of(name, top)
        decays = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
        empty = {
            "params": [],
            "weight_decay": weight_decay if decays else 0.0,
            "lr_scale": layer_decay ** (top - layer),
        }
        groups.setdefault((layer, decays), empty)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _layer_of(name: str, top: int) -> int:
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    return int(block[1]) + 1 if (block := re.match(r"blocks\.(\d+)\.", name)) else top


def lr_at(step: int, *, peak: float, floor: float, warmup_steps: float, total_steps: int) -> float:
    """Learning rate of `step` (from 0): linear from 0 to `peak` during warm-up, then half a cosine down to `floor`.

    The reference's fractional epoch is step / steps per epoch, so `warmup_steps` is warm-up epochs x steps per epoch.
    The rate is set before the step: step 0 of a warm-up changes no weights. `floor` would be the rate of step
    `total_steps`, which no longer runs.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


class Span(NamedTuple):
    """A range of a flat parameter that holds elements of one matrix."""

    start: int
    size: int
    matrix: int
    """Index of the matrix."""


class LARS(torch.optim.Optimizer):
    """Momentum SGD that scales the step of each matrix to the norm of the matrix (You et al. 2017, arXiv 1708.03888).

    As in the reference implementation for linear probing, tensors with two or more dimensions decay, and their gradient
    is scaled by trust x |p| / |g| (by 1 if either norm is 0). 1-D tensors are neither decayed nor scaled. Norms are
    summed in float64, so the partition of a matrix over ranks has almost no effect.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})
        self._spans: Mapping[Tensor, list[Span]] | None = None
        self._matrices = 0
        self._sum_over_ranks: Callable[[Tensor], Tensor] = lambda squares: squares

    def set_partition(
        self, spans: Mapping[Tensor, list[Span]], matrices: int, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        """Use flat parameters that hold parts of `matrices` matrices; other ranks hold the other parts.

        `spans` lists the ranges of each parameter. `sum_over_ranks` returns the sum of a tensor over all ranks, which
        must call `step` together.
        """
        self._spans, self._matrices, self._sum_over_ranks = spans, matrices, sum_over_ranks

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update all parameters that have a gradient; return the loss of `closure`, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self._spans is None:
            spans = {p: [Span(0, p.numel(), n)] if p.ndim > 1 else [] for n, (_, p) in enumerate(found)}
            squares = torch.zeros(len(found), 2, dtype=torch.float64)
        else:
            spans = {p: self._spans.get(p, []) for _, p in found}
            squares = torch.zeros(self._matrices, 2, dtype=torch.float64)
        updates: list[Tensor] = []
        if found:
            squares = squares.to(found[0][1].device)
        for group, p in found:
            updates.append(p.grad.flatten().clone())
            for span in spans[p]:
                part = slice(span.start, span.start + span.size)
                whole, update = p.flatten()[part], updates[-1][part]
                update.add_(whole, alpha=group["weight_decay"])
                squares[span.matrix] += torch.stack([whole.double().square().sum(), update.double().square().sum()])
        norms = self._sum_over_ranks(squares).sqrt()  # (matrices, 2)
        for (group, p), update in zip(found, updates, strict=True):
            for span in spans[p]:
                weight_norm, update_norm = norms[span.matrix]
                both_positive = (weight_norm > 0) & (update_norm > 0)
                trust = torch.where(both_positive, group["trust"] * weight_norm / update_norm, 1.0)
                update[span.start : span.start + span.size].mul_(trust.to(update.dtype))
            state = self.state[p]
            if "momentum" not in state:
                state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(p)
            state["step"] += 1
            state["momentum"].mul_(group["momentum"]).add_(update.view_as(p))
            p.sub_(state["momentum"], alpha=group["lr"])
        return loss
