"""The part of every parameter's float32 state that this rank holds under ZeRO 1, 2 and 3, by name and position.

DeepSpeed flattens parameters into partitions whose boundaries depend on the stage and the number of ranks. A `Piece`
says which elements of which parameter are where in them. Checkpoints are therefore written and read by parameter name
and position, and any stage and any number of ranks can resume from them. DeepSpeed's own universal conversion is not
used: at stage 3 its load gives every group the weight decay of the first group (measured, DeepSpeed 0.19.8).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
"""State that AdamW keeps per number; LARS keeps `momentum`."""
EMA = "ema"


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `start + size` of the flattened parameter `name`, stored at `offset` of partition `flat`."""

    name: str
    start: int
    size: int
    flat: int
    offset: int


@dataclass(frozen=True)
class Partition:
    """This rank's float32 master weights and moments, and the EMA of its weights if the run keeps one."""

    pieces: list[Piece]
    flats: list[Tensor]
    """The optimizer's own flat master weights, on the device."""
    optimizer: torch.optim.Optimizer
    moments: tuple[str, ...] = MOMENTS
    """Names of the state that the optimizer keeps per number."""
    ema: list[Tensor] | None = None
    """Exponential moving average of `flats` over steps, of the same shapes; see `keep_ema`."""

    def keep_ema(self) -> "Partition":
        """Returns this partition with an EMA that starts from the current weights."""
        return replace(self, ema=[flat.detach().clone() for flat in self.flats])

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """Call after a step: ema = decay x ema + (1 - decay) x weights."""
        assert self.ema is not None
        for average, flat in zip(self.ema, self.flats, strict=True):
            average.lerp_(flat, 1 - decay)

    @property
    def weights(self) -> dict[str, list[Tensor]]:
        """Flat tensors per kind: `weight`, and `ema` if the run keeps one."""
        return {"weight": [flat.data for flat in self.flats]} | ({EMA: self.ema} if self.ema is not None else {})

    def whole(self, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Merges the float32 `weights` of all ranks, on the device; all ranks call it together."""
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
        """The state `kind` of `flats[flat]`, of its length; zeros before the first step."""
        state = self.optimizer.state.get(self.flats[flat], {})
        return state[kind] if kind in state else torch.zeros_like(self.flats[flat])

    def steps(self) -> int:
        """Optimizer steps taken; skipped steps do not count."""
        states = (self.optimizer.state.get(flat, {}) for flat in self.flats)
        return next((int(state["step"].item()) for state in states if "step" in state), 0)

    @torch.no_grad()
    def fill(self, steps: int, values: Mapping[tuple[str, Piece], Tensor]) -> None:
        """Sets the float32 `values` of every piece, for each kind of `weights` and `moments`."""
        for number, flat in enumerate(self.flats):
            state = {kind: torch.zeros_like(flat) for kind in self.moments}
            weights = {kind: flats[number] for kind, flats in self.weights.items()}
            for piece in (piece for piece in self.pieces if piece.flat == number):
                for kind, whole in {**weights, **state}.items():
                    whole.narrow(0, piece.offset, piece.size).copy_(values[kind, piece])
            # Float32 and on the parameters' device, as fused AdamW creates it.
            step = torch.tensor(float(steps), device=flat.device)
            self.optimizer.state[flat] = {"step": step, **state}


def partition_of(engine: Any) -> Partition:
    """The partition of a DeepSpeed engine. Its tensors are the engine's own, not copies."""
    zero = engine.optimizer
    named = [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
    moments = MOMENTS if isinstance(zero.optimizer, torch.optim.AdamW) else ("momentum",)
    pieces = []
    if engine.zero_optimization_stage() == 3:
        flats = zero.fp32_partitioned_groups_flat
        for name, parameter in named:
            flat, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = size * torch.distributed.get_rank()
            whole = min(size, parameter.ds_numel - start)  # the partitions of the last ranks are padded
            if whole > 0:
                pieces.append(Piece(name, start, whole, flat, offset))
        return Partition(pieces, list(flats), zero.optimizer, moments)
    # DeepSpeed has two optimizers with different names: one for bf16 at stage 1, one for everything else.
    bf16 = hasattr(zero, "fp32_groups_flat_partition")
    flats = zero.fp32_groups_flat_partition if bf16 else zero.single_partition_of_fp32_groups
    for name, parameter in named:
        if (mapping := parameter._hp_mapping) is not None:  # this rank's partition holds a part of it
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            pieces.append(Piece(name, low.start, low.numel, mapping.param_group_index, high.start))
    return Partition(pieces, list(flats), zero.optimizer, moments)
