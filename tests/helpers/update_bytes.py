"""Counts the bytes that the operators of DeepSpeed's optimizer step read and write, on one rank."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maelstream.jobs.distributed.ranks import process_group, ranks_from_environment
from maelstream.jobs.recipe import EngineConfig, OptimConfig, Recipe
from maelstream.jobs.training.engine import build_engine, build_model
from maelstream.model.config import MAEConfig
from maelstream.pipeline.batch_plan import BatchSplit

CONFIG = MAEConfig(
    image_size=(32, 32), patch_size=8, dim=256, depth=4, heads=4, decoder_dim=128, decoder_depth=2, decoder_heads=4
)


class OperatorBytes(TorchDispatchMode):
    """Sums the bytes that operators inside this context read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        arguments = func._schema.arguments
        values = dict(zip((each.name for each in arguments), args, strict=False)) | (kwargs or {})
        written = {each.name for each in arguments if each.alias_info is not None and each.alias_info.is_write}
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in arguments)
        if views or "empty" in func.name():
            return result
        for name, value in values.items():
            size = sum(each.nbytes for each in tree_leaves(value) if isinstance(each, Tensor))
            # AdamW declares its gradients as written, but writes them only for a gradient scaler.
            writes = name in written and name != "grads"
            reads = name not in written or func.name() == "aten::_fused_adamw_" or func.name() == "aten::mul_.Tensor"
            self.bytes += size * (reads + writes)
        if not written:
            self.bytes += sum(each.nbytes for each in tree_leaves(result) if isinstance(each, Tensor))
        return result


def count_update_bytes(port: int, out: Path) -> None:
    """Write the bytes of the second optimizer step, by stage of ZeRO, to the JSON file `out`."""
    environment = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in environment.items()} | {"MASTER_ADDR": "127.0.0.1"}
    images = torch.zeros(2, CONFIG.in_chans, *CONFIG.image_size, dtype=torch.uint8)
    counted = {}
    with process_group(ranks_from_environment(), 120):
        for stage in (1, 2, 3):
            recipe = Recipe(model=CONFIG, optim=OptimConfig(batch_size=4), engine=EngineConfig(zero=stage))
            engine = build_engine(recipe, BatchSplit(4, 1, 2), build_model(recipe, None))
            for _ in range(2):  # the first step also creates the moments
                engine.backward(engine(images, torch.arange(2)))
                engine.step()
                engine.backward(engine(images, torch.arange(2)))
                with OperatorBytes() as operators:
                    engine.step()
            counted[stage] = operators.bytes
            engine.destroy()
    out.write_text(json.dumps(counted))
