"""Upper bound of the MFU of a training step on an H100, without a GPU.

    python -m benchmarks.roofline

The forward and backward passes run on fake tensors, which compute nothing. Every operator is counted as eager PyTorch
would run it on the GPU: it takes the time of its FLOPs or of its bytes, whichever is longer. The bound assumes the data
sheet's peaks of products and of memory, so a measured MFU is lower. A fused step has a higher bound, because operators
that are fused do not move their results.
"""

import argparse
import math
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.fake_tensors import fake_mae
from maelstream.jobs.hardware import DEVICES
from maelstream.model.config import MAEConfig
from maelstream.model.flops import training_flops
from maelstream.model.sizes import PAPER_SIZES

H100 = DEVICES["h100"]
MICRO_BATCH = 128
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass
class Roofline(TorchDispatchMode):
    """Sums the least seconds of every operator that is called inside this context."""

    seconds: float = 0.0
    product_seconds: float = 0.0
    """Seconds of the operators that multiply matrices."""
    kernels: int = 0
    """Operators that move bytes; views move none."""

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        storages = {each.untyped_storage()._cdata for each in inputs}
        in_place = func._schema.is_mutable
        if not in_place and all(each.untyped_storage()._cdata in storages for each in outputs):
            return result  # a view
        flops = _flops(func, args, kwargs or {}, result)
        seconds = max(flops / H100.flops_per_s, sum(map(_bytes, inputs + outputs)) / H100.memory_bytes_per_s)
        self.seconds += seconds
        self.product_seconds += seconds if flops else 0.0
        self.kernels += 1
        return result


def step_roofline(config: MAEConfig, batch: int) -> Roofline:
    """The roofline of a forward and backward pass of `batch` images in bf16, with fused attention."""
    mode = FakeTensorMode()
    model = fake_mae(config, "cpu", torch.bfloat16, mode)
    with mode, Roofline() as roofline:
        images = torch.empty(batch, 3, *config.image_size, dtype=torch.uint8)
        model(images, torch.empty(batch, dtype=torch.int64)).backward()
    return roofline


def bound(config: MAEConfig, batch: int, roofline: Roofline) -> float:
    """The largest MFU that `roofline` allows: FLOPs of the model per second, divided by the peak."""
    return training_flops(config) * batch / roofline.seconds / H100.flops_per_s


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    if func.overloadpacket in (_ATTENTION, _ATTENTION_BACKWARD):  # torch counts none for them
        query = args[0] if func.overloadpacket is _ATTENTION else args[1]
        *batch, length, width = query.shape
        products = 2 if func.overloadpacket is _ATTENTION else 5
        return products * 2.0 * math.prod(batch) * length * length * width
    count = flop_registry.get(func.overloadpacket)
    return count(*args, **kwargs, out_val=result) if count else 0.0


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return _tensors(list(value.values()))
    return [each for item in value for each in _tensors(item)] if isinstance(value, list | tuple) else []


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def main() -> None:
    parser = argparse.ArgumentParser(description="Upper bound of the MFU on an H100, without a GPU")
    parser.add_argument("--batch", type=int, default=MICRO_BATCH, help="images per step")
    batch = parser.parse_args().batch
    table = Table("model", "operators", "step", "of it products", "bound of MFU", title=f"{H100.name}, {batch} images")
    for name, size in PAPER_SIZES.items():
        config = MAEConfig(**size._asdict(), attention="sdpa")
        roofline = step_roofline(config, batch)
        table.add_row(
            name,
            f"{roofline.kernels:,}",
            f"{1e3 * roofline.seconds:.1f} ms",
            f"{1e3 * roofline.product_seconds:.1f} ms",
            f"{bound(config, batch, roofline):.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
