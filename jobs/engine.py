"""The DeepSpeed engine of a recipe, on whatever accelerator this process finds: ZeRO-1, bf16, our own lr.

DeepSpeed launches, shards the optimizer and reduces gradients; the order of samples, the lr and the checkpoints'
folder are ours, because its own lose steps or state (docs/training.md).
"""

import contextlib
import io
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

# Before DeepSpeed is imported, which otherwise warns on every rank that it found no accelerator.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param

from jobs.recipe import Recipe
from model.mae import MAE
from model.optimise import weight_decay_groups
from model.targets import PCATarget, TokenTarget
from pipeline.line import Slices
from shards.errors import MaelstreamError


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world_size: int
    local_world_size: int

    @property
    def threads(self) -> int:
        """This rank's share of the machine's cores."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world_size)


def ranks_from_environment() -> Ranks:
    """As the launcher (`deepspeed`, `torchrun`) set them; one rank without a launcher."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size  # torchrun, deepspeed
    return Ranks(int(os.environ.get("RANK", "0")), world_size, int(local))


@contextlib.contextmanager
def process_group(ranks: Ranks) -> Iterator[None]:
    """Joins the ranks, and leaves them together when the block ends."""
    if ranks.world_size == 1:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ.setdefault("MASTER_PORT", str(free.getsockname()[1]))
    # The shared-memory all-reduce for CPUs is compiled at its first use, which takes a minute and a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(ranks.threads)
    deepspeed.init_distributed(get_accelerator().communication_backend_name(), verbose=False)
    try:
        yield
    except MaelstreamError as error:  # a bad sample, say, is met by one rank alone
        error.found_by_all = False
        raise
    finally:
        torch.distributed.destroy_process_group()


class Float32Arithmetic(MAE):
    """bf16 parameters, as DeepSpeed keeps them, but sums and products in float32.

    For CPUs without bf16 instructions, where torch multiplies bf16 matrices ten times slower than float32 ones.
    """

    def forward(self, images: Tensor, keys: Tensor) -> Tensor:
        if self.cls_token.dtype == torch.float32:  # the call below, with its widened parameters
            return super().forward(images, keys)
        widened = {name: parameter.float() for name, parameter in self.named_parameters()}
        return functional_call(self, widened, (images, keys))


def build_engine(recipe: Recipe, slices: Slices, target: PCATarget | TokenTarget | None) -> Any:
    """A DeepSpeed engine around a freshly initialised MAE; the same weights on every rank and device."""
    cpu_lacks_bf16 = not torch.cuda.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    widen = recipe.engine.precision == "bf16" and cpu_lacks_bf16
    model = (Float32Arithmetic if widen else MAE)(recipe.model, recipe.seed, target)
    optimizer = torch.optim.AdamW(
        weight_decay_groups(model, recipe.optim.weight_decay), lr=0.0, betas=recipe.optim.betas, fused=True
    )
    config = {
        "train_micro_batch_size_per_gpu": slices.largest,  # only its log reads it
        "gradient_accumulation_steps": slices.micro_batches,
        "zero_optimization": {"stage": 1, "overlap_comm": False},  # open race reports when it overlaps
        "bf16": {"enabled": recipe.engine.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**62,  # we log
    }
    with contextlib.redirect_stdout(io.StringIO()):  # its optimizer prints the memory in use eighteen times
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def set_lr(engine: Any, lr: float) -> None:
    """For the coming step. DeepSpeed's scheduler does not advance on a skipped step; ours is the step counter."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def merged_weights(engine: Any) -> dict[str, Tensor]:
    """The float32 master weights, whole and on the CPU, on rank 0; all ranks take part, the others get none."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        merged = safe_get_full_fp32_param(parameter)  # one at a time, which fits beside the model
        if torch.distributed.get_rank() == 0:
            weights[name] = merged.cpu()
    return weights


def mean_over_ranks(value: Tensor) -> float:
    """Float of a scalar's mean over all ranks."""
    total = value.detach().clone()
    torch.distributed.all_reduce(total)
    return total.item() / torch.distributed.get_world_size()
