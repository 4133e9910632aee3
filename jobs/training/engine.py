"""The DeepSpeed engine of a recipe, on the accelerator of this process: ZeRO 1 to 3, bf16 or float32.

DeepSpeed shards the optimizer and reduces gradients. The order of samples, the lr, the decision to skip a step and
checkpoints are our own code, because DeepSpeed's lose steps or state (docs/training.md).
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from maelstream.jobs.distributed import ranks  # noqa: F401  chooses the accelerator before DeepSpeed is imported

# isort: split
import deepspeed

from maelstream.jobs.hardware import multiplies_bf16, process_device
from maelstream.jobs.recipe import AnyRecipe, Recipe
from maelstream.model.mae import MAE
from maelstream.model.optimise import weight_decay_groups
from maelstream.model.targets import PCATarget, TokenTarget
from maelstream.pipeline.batch_plan import BatchSplit


class Float32Arithmetic(MAE):
    """An MAE with bf16 parameters, as DeepSpeed keeps them, that computes in float32.

    For CPUs without bf16 instructions: there torch multiplies bf16 matrices ten times slower than float32 matrices.
    """

    def forward(self, images: Tensor, keys: Tensor) -> Tensor:
        if self.cls_token.dtype == torch.float32:  # the call below, with float32 parameters
            return super().forward(images, keys)
        widened = {name: parameter.float() for name, parameter in self.named_parameters()}
        return functional_call(self, widened, (images, keys))


class Float32Classifier(VisionTransformer):
    """A ViT classifier with bf16 parameters that computes in float32."""

    def forward(self, images: Tensor) -> Tensor:
        if self.cls_token.dtype == torch.float32:
            return super().forward(images)
        widened = {name: parameter.float() for name, parameter in self.named_parameters()}
        return functional_call(self, widened, (images.float(),))


def build_model(recipe: Recipe, target: PCATarget | TokenTarget | None) -> MAE:
    """Builds an MAE with initial weights, the same on every rank and device."""
    model = (Float32Arithmetic if needs_widening(recipe) else MAE)(recipe.model, recipe.seed, target)
    model.activation_checkpointing = recipe.engine.activation_checkpointing
    return model


def needs_widening(recipe: AnyRecipe) -> bool:
    """Whether to compute in float32 with bf16 weights, because this CPU has no bf16 instructions."""
    # At stage 3 a module has its parameters only while its forward pass runs, so they cannot all be widened before it.
    # Activation checkpointing repeats the forward pass with the original parameters.
    can_widen = recipe.engine.zero < 3 and not recipe.engine.activation_checkpointing
    return recipe.engine.precision == "bf16" and not multiplies_bf16(process_device()) and can_widen


def adamw(recipe: AnyRecipe, groups: list[dict]) -> torch.optim.Optimizer:
    """AdamW over parameter groups; `set_lr` sets their lr."""
    return torch.optim.AdamW(groups, lr=0.0, betas=recipe.optim.betas, fused=True)


def build_engine(recipe: Recipe, batch_split: BatchSplit, model: MAE) -> Any:
    """Builds the DeepSpeed engine of pre-training around `model`, which keeps its weights."""
    return engine_around(
        recipe, batch_split, model, adamw(recipe, weight_decay_groups(model, recipe.optim.weight_decay))
    )


def engine_around(
    recipe: AnyRecipe, batch_split: BatchSplit, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Any:
    """Builds a DeepSpeed engine around any model and optimizer."""
    zero: dict[str, Any] = {"stage": recipe.engine.zero, "overlap_comm": False}  # overlapping has open race reports
    if recipe.engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config = {
        "train_micro_batch_size_per_gpu": batch_split.largest,  # used only in its log
        "gradient_accumulation_steps": batch_split.micro_batches,
        "gradient_clipping": recipe.optim.clip_grad,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # LARS; a test compares it with the reference's
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the CPU and needs no compiler
        "bf16": {"enabled": recipe.engine.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # stages 2 and 3 reduce every micro-batch: in bf16 that rounds each sum
        "steps_per_print": 2**62,  # maelstream logs
    }
    if recipe.engine.compile:
        model.compile()
    with contextlib.redirect_stdout(io.StringIO()):  # its optimizer prints memory use 18 times
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def set_lr(engine: Any, lr: float) -> None:
    """Sets the lr of the next step. DeepSpeed's scheduler is not used: it does not advance on a skipped step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def gradients_are_finite(engine: Any) -> bool:
    """Whether this rank's share of the reduced gradients is finite.

    DeepSpeed itself checks at stages 1 and 2, and at stage 3 only in fp16.
    """
    if engine.zero_optimization_stage() < 3:
        return True
    zero = engine.optimizer
    if zero.offload_optimizer:
        return all(flat.grad is None or bool(flat.grad.isfinite().all()) for flat in zero.fp32_partitioned_groups_flat)
    return bool(zero.grad_partitions_flat_buffer.isfinite().all())


@contextlib.contextmanager
def without_update(engine: Any) -> Iterator[None]:
    """Inside the block, `engine.step()` clears gradients and counts the step, but changes no weight and no moment."""
    optimizer = engine.optimizer.optimizer
    optimizer.step = lambda closure=None: None
    try:
        yield
    finally:
        del optimizer.step


def clear_accumulated_gradients(engine: Any) -> None:
    """Call after a skipped step: with offload, stages 1 and 2 keep their sums and would add to NaN from then on."""
    if engine.zero_optimization_stage() < 3 and engine.zero_cpu_offload():
        sums = engine.optimizer.averaged_gradients
        sums.update(dict.fromkeys(sums))
