"""Which part of every parameter's float32 state this rank holds under ZeRO 1, 2 and 3, by name and place.

DeepSpeed flattens parameters into partitions whose cut depends on stage and number of ranks. A `Piece` says which
elements of which parameter lie where in them, so that a checkpoint is written and read by parameter name and place:
any stage and any number of ranks can go on from it, without DeepSpeed's universal conversion, whose load at stage 3
gives every group the first group's weight decay (measured, 0.19.8).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW; LARS has `momentum`."""
MEAN = "ema"


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `start + size` of the flattened parameter `name`: those at `offset` of partition `flat`."""

    name: str
    start: int
    size: int
    flat: int
    offset: int


@dataclass(frozen=True)
class Partition:
    """This rank's float32 master weights, moments and, where it is kept, the mean of the weights."""

    pieces: list[Piece]
    flats: list[Tensor]
    """Master weights, flat, as the optimizer holds them; on the device."""
    optimizer: torch.optim.Optimizer
    moments: tuple[str, ...] = MOMENTS
    """What the optimizer keeps of each number."""
    means: list[Tensor] | None = None
    """As `flats`: an exponential mean of them over steps; see `keep_ema`."""

    def keep_ema(self) -> "Partition":
        """The same with a mean, which begins as the weights are."""
        return replace(self, means=[flat.detach().clone() for flat in self.flats])

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """After a step: mean = decay x mean + (1 - decay) x weights."""
        assert self.means is not None
        for mean, flat in zip(self.means, self.flats, strict=True):
            mean.lerp_(flat, 1 - decay)

    @property
    def weights(self) -> dict[str, list[Tensor]]:
        """`weight`, and the mean if there is one, each by partition."""
        return {"weight": [flat.data for flat in self.flats]} | ({MEAN: self.means} if self.means is not None else {})

    def whole(self, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Float32 `weights` of all ranks put together, on the device; all ranks call it together."""
        wholes = {}
        for name, shape in shapes.items():
            flat = torch.zeros(torch.Size(shape).numel(), device=self.flats[0].device)
            for piece in (piece for piece in self.pieces if piece.name == name):
                part = self.weights[kind][piece.flat][piece.offset : piece.offset + piece.size]
                flat[piece.start : piece.start + piece.size] = part
            torch.distributed.all_reduce(flat)
            wholes[name] = flat.view(shape)
        return wholes

    def moment(self, flat: int, kind: str) -> Tensor:
        """As long as `flats[flat]`; zeros before the first step."""
        state = self.optimizer.state.get(self.flats[flat], {})
        return state[kind] if kind in state else torch.zeros_like(self.flats[flat])

    def steps(self) -> int:
        """Optimizer steps taken; a skipped step is none."""
        states = (self.optimizer.state.get(flat, {}) for flat in self.flats)
        return next((int(state["step"].item()) for state in states if "step" in state), 0)

    @torch.no_grad()
    def fill(self, steps: int, values: Mapping[tuple[str, Piece], Tensor]) -> None:
        """Puts the float32 `values` of every kind (those of `weights` and `moments`) and piece in place."""
        for number, flat in enumerate(self.flats):
            state = {kind: torch.zeros_like(flat) for kind in self.moments}
            weights = {kind: flats[number] for kind, flats in self.weights.items()}
            for piece in (piece for piece in self.pieces if piece.flat == number):
                for kind, whole in {**weights, **state}.items():
                    whole.narrow(0, piece.offset, piece.size).copy_(values[kind, piece])
            # Float32 and beside the parameters, as the fused AdamW makes it.
            step = torch.tensor(float(steps), device=flat.device)
            self.optimizer.state[flat] = {"step": step, **state}


def partition_of(engine: Any) -> Partition:
    """The partition of a DeepSpeed engine; its tensors are the engine's own, not copies."""
    zero = engine.optimizer
    named = [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
    moments = MOMENTS if isinstance(zero.optimizer, torch.optim.AdamW) else ("momentum",)
    pieces = []
    if engine.zero_optimization_stage() == 3:
        flats = zero.fp32_partitioned_groups_flat
        for name, parameter in named:
            flat, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = size * torch.distributed.get_rank()
            whole = min(size, parameter.ds_numel - start)  # the last ranks' partitions are padded
            if whole > 0:
                pieces.append(Piece(name, start, whole, flat, offset))
        return Partition(pieces, list(flats), zero.optimizer, moments)
    # A name each of DeepSpeed's two optimizers: that of bf16 at stage 1, and that of everything else.
    bf16 = hasattr(zero, "fp32_groups_flat_partition")
    flats = zero.fp32_groups_flat_partition if bf16 else zero.single_partition_of_fp32_groups
    for name, parameter in named:
        if (mapping := parameter._hp_mapping) is not None:  # part of it lies in this rank's partition
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            pieces.append(Piece(name, low.start, low.numel, mapping.param_group_index, high.start))
    return Partition(pieces, list(flats), zero.optimizer, moments)
