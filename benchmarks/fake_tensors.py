"""A model of any size on any device without its memory: all its tensors have shapes, and no contents."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from maelstream.model.config import MAEConfig
from maelstream.model.mae import MAE


def fake_mae(config: MAEConfig, device: str, dtype: torch.dtype, mode: FakeTensorMode) -> MAE:
    """An MAE whose parameters, of `dtype`, and buffers are fake tensors of `mode` on `device`, which need not exist."""
    with torch.device("meta"):
        model = MAE(config)
    with mode:  # a module cannot be moved to fake tensors, so each tensor is replaced
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return model
