"""The DeepSpeed engine of a recipe, on whatever accelerator this process finds: ZeRO 1 to 3, bf16 or float32.

DeepSpeed shards the optimizer and reduces gradients; the order of samples, the lr, the decision to skip a step and
the checkpoints are ours, because its own lose steps or state (docs/training.md).
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from maelstream.jobs.distributed import ranks  # noqa: F401  it chooses the accelerator, before DeepSpeed is imported

# isort: split
import deepspeed

from maelstream.jobs.recipe import AnyRecipe, Recipe
from maelstream.model.mae import MAE
from maelstream.model.optimise import weight_decay_groups
from maelstream.model.targets import PCATarget, TokenTarget
from maelstream.pipeline.batch_plan import BatchSplit


class Float32Arithmetic(MAE):
    """bf16 parameters, as DeepSpeed keeps them, but sums and products in float32.

    For CPUs without bf16 instructions, where torch multiplies bf16 matrices ten times slower than float32 ones.
    """

    def forward(self, images: Tensor, keys: Tensor) -> Tensor:
        if self.cls_token.dtype == torch.float32:  # the call below, with its widened parameters
            return super().forward(images, keys)
        widened = {name: parameter.float() for name, parameter in self.named_parameters()}
        return functional_call(self, widened, (images, keys))


class Float32Classifier(VisionTransformer):
    """Likewise a ViT with a head."""

    def forward(self, images: Tensor) -> Tensor:
        if self.cls_token.dtype == torch.float32:
            return super().forward(images)
        widened = {name: parameter.float() for name, parameter in self.named_parameters()}
        return functional_call(self, widened, (images.float(),))


def build_model(recipe: Recipe, target: PCATarget | TokenTarget | None) -> MAE:
    """A freshly initialised MAE; the same weights on every rank and device."""
    model = (Float32Arithmetic if needs_widening(recipe) else MAE)(recipe.model, recipe.seed, target)
    model.activation_checkpointing = recipe.engine.activation_checkpointing
    return model


def needs_widening(recipe: AnyRecipe) -> bool:
    """Whether bf16 weights are to be multiplied in float32, because this CPU is so much slower otherwise."""
    cpu_lacks_bf16 = not torch.cuda.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    # At stage 3 a module's parameters are there while its forward runs; they cannot be widened all at once before. And
    # what is computed again in the backward pass meets them as they are.
    whole = recipe.engine.zero < 3 and not recipe.engine.activation_checkpointing
    return recipe.engine.precision == "bf16" and cpu_lacks_bf16 and whole


def adamw(recipe: AnyRecipe, groups: list[dict]) -> torch.optim.Optimizer:
    """Over parameter groups, whose lr `set_lr` sets."""
    return torch.optim.AdamW(groups, lr=0.0, betas=recipe.optim.betas, fused=True)


def build_engine(recipe: Recipe, batch_split: BatchSplit, model: MAE) -> Any:
    """A DeepSpeed engine around `model`, whose weights it starts from; as pre-training has it."""
    return engine_around(
        recipe, batch_split, model, adamw(recipe, weight_decay_groups(model, recipe.optim.weight_decay))
    )


def engine_around(
    recipe: AnyRecipe, batch_split: BatchSplit, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Any:
    """A DeepSpeed engine around any model and optimizer."""
    zero: dict[str, Any] = {"stage": recipe.engine.zero, "overlap_comm": False}  # open race reports when it overlaps
    if recipe.engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config = {
        "train_micro_batch_size_per_gpu": batch_split.largest,  # only its log reads it
        "gradient_accumulation_steps": batch_split.micro_batches,
        "gradient_clipping": recipe.optim.clip_grad,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # LARS; a test compares it with the reference's
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the CPU, and needs no compiler
        "bf16": {"enabled": recipe.engine.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # stages 2 and 3 reduce every micro-batch: in bf16 that rounds each sum
        "steps_per_print": 2**62,  # we log
    }
    if recipe.engine.compile:
        model.compile()
    with contextlib.redirect_stdout(io.StringIO()):  # its optimizer prints the memory in use eighteen times
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def set_lr(engine: Any, lr: float) -> None:
    """For the coming step. DeepSpeed's scheduler does not advance on a skipped step; ours is the step counter."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def gradients_are_finite(engine: Any) -> bool:
    """Whether this rank's share of the reduced gradients is; stages 1 and 2 look themselves, stage 3 in fp16 alone."""
    if engine.zero_optimization_stage() < 3:
        return True
    zero = engine.optimizer
    if zero.offload_optimizer:
        return all(flat.grad is None or bool(flat.grad.isfinite().all()) for flat in zero.fp32_partitioned_groups_flat)
    return bool(zero.grad_partitions_flat_buffer.isfinite().all())


@contextlib.contextmanager
def without_update(engine: Any) -> Iterator[None]:
    """`engine.step()` inside clears gradients and counts, as it must, but moves no weight and no moment."""
    optimizer = engine.optimizer.optimizer
    optimizer.step = lambda closure=None: None
    try:
        yield
    finally:
        del optimizer.step


def clear_accumulated_gradients(engine: Any) -> None:
    """After a skipped step: stages 1 and 2 with offload keep what they had summed, and would add to NaN from now on."""
    if engine.zero_optimization_stage() < 3 and engine.zero_cpu_offload():
        sums = engine.optimizer.averaged_gradients
        sums.update(dict.fromkeys(sums))
