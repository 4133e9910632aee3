"""What the optimiser is told: which parameters decay, and the learning rate of a step and of a layer; and LARS.

The paper's appendix A.1: AdamW for pre-training and fine-tuning, LARS for linear probing.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for AdamW: first those without decay (biases and every other 1-D tensor), then the rest.

    Class and mask token are 3-D and do decay, as in the reference implementation; frozen parameters are left out.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    still = {name for name, parameter in trained if parameter.ndim <= 1 or name.endswith(".bias")}
    return [
        {"params": [parameter for name, parameter in trained if name in still], "weight_decay": 0.0},
        {"params": [parameter for name, parameter in trained if name not in still], "weight_decay": weight_decay},
    ]


def layer_decay_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Parameter groups for fine-tuning a ViT: each layer's lr is `layer_decay` times that of the layer above it.

    `model.blocks` are the layers in between; below them lie patch embedding, class token and position table, above them
    norm and head. The lr of a group is `lr_at(...)` x its `lr_scale`, which is 1 at the top. 1-D tensors, class token
    and position table do not decay; frozen parameters are left out.
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
    """Learning rate of `step` (from 0): linear from 0 to `peak` in the warm-up, then half a cosine down to `floor`.

    Steps are iterations: the reference's fractional epoch is step / steps per epoch, so `warmup_steps` is warm-up
    epochs x steps per epoch. The rate is set before the step, so step 0 of a warm-up moves nothing, and `floor` itself
    belongs to step `total_steps`, the first that is no longer run.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


class Span(NamedTuple):
    """Elements of a matrix in the memory of a parameter, in which there may be others of the matrix or of others."""

    start: int
    size: int
    matrix: int
    """Number of the matrix."""


class LARS(torch.optim.Optimizer):
    """Momentum SGD whose step on each matrix is scaled to the matrix's own norm (You et al. 2017, arXiv 1708.03888).

    As the reference implementation has it for linear probing: tensors of two and more dimensions decay, and their
    gradient is scaled by trust x |p| / |g| (by 1 where either norm is 0); 1-D tensors are neither decayed nor scaled.
    Norms are summed in float64, so that it hardly matters how a matrix is cut.
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
        self._summed: Callable[[Tensor], Tensor] = lambda squares: squares

    def cut(self, spans: Mapping[Tensor, list[Span]], matrices: int, summed: Callable[[Tensor], Tensor]) -> None:
        """From now on parameters are flat and hold parts of `matrices` matrices, others of which other ranks hold.

        `summed` adds a tensor up over ranks; all of them call `step` together.
        """
        self._spans, self._matrices, self._summed = spans, matrices, summed

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step on every parameter that has a gradient; the loss of `closure`, if given."""
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
        norms = self._summed(squares).sqrt()  # (matrices, 2)
        for (group, p), update in zip(found, updates, strict=True):
            for span in spans[p]:
                of_weights, of_update = norms[span.matrix]
                trust = torch.where((of_weights > 0) & (of_update > 0), group["trust"] * of_weights / of_update, 1.0)
                update[span.start : span.start + span.size].mul_(trust.to(update.dtype))
            state = self.state[p]
            if "momentum" not in state:
                state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(p)
            state["step"] += 1
            state["momentum"].mul_(group["momentum"]).add_(update.view_as(p))
            p.sub_(state["momentum"], alpha=group["lr"])
        return loss
