"""Bytes that each image adds to the peak memory of a forward and backward pass, measured.

On CUDA the allocator reports the peak. On a CPU it is the peak of all tensors that operators return, without gradients
of weights.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from maelstream.model.config import MAEConfig
from maelstream.model.mae import MAE


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of living tensors that operators have returned inside this context, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {each.untyped_storage()._cdata for each in args if isinstance(each, Tensor)}
        for each in result if isinstance(result, tuple | list) else [result]:
            if not isinstance(each, Tensor) or each.untyped_storage()._cdata in self.known | inputs:
                continue
            storage = each.untyped_storage()
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def forget(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.live -= size


def discard_gradients(model: nn.Module) -> None:
    """Frees each gradient of a weight at once; otherwise these would dominate the peak of a small batch."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))


def bytes_per_image(config: MAEConfig, checkpointing: bool, device: torch.device, bf16: bool) -> float:
    """Bytes that each further image adds to the peak of a forward and backward pass."""
    model = MAE(config).to(device)
    model.activation_checkpointing = checkpointing
    discard_gradients(model)
    peaks = {}
    for batch in (2, 4) if device.type == "cpu" else (16, 32):
        images = torch.zeros(batch, 3, *config.image_size, dtype=torch.uint8, device=device)
        keys = torch.arange(batch, device=device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                loss = model(images, keys)
            loss.backward()
            peaks[batch] = torch.cuda.max_memory_allocated()
        else:
            with LiveTensors() as tensors:
                model(images, keys).backward()
            peaks[batch] = tensors.peak
    small, large = peaks
    return (peaks[large] - peaks[small]) / (large - small)
