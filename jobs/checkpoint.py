"""Checkpoints of a run: `checkpoints/step-00001234/`, whole or absent.

It holds `weights.safetensors`, the float32 weights merged (DeepSpeed's own converter, `zero_to_fp32`, refuses what its
bf16 optimizer writes), and `engine/`, DeepSpeed's files, one a rank. All is written into a folder of another name that
is synced to the disk and then renamed: a crash at any moment leaves the older checkpoints as they were. DeepSpeed's own
`latest` file is not used: where it is missing, DeepSpeed starts again from step 0 without a word.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.loader import LoaderState
from shards.errors import MaelstreamError

_WEIGHTS, _ENGINE = "weights.safetensors", "engine"
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(MaelstreamError):
    """A run without a checkpoint, or one that this start cannot load."""


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run; `save` and `load` are called by all ranks together."""

    folder: Path

    def steps(self) -> list[int]:
        """Steps with a whole checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))

    def save(self, engine: Any, step: int, loader: LoaderState, dataset: str, keep: int) -> None:
        """Writes the state after `step` steps, then drops all but the `keep` newest checkpoints.

        `dataset` is the fingerprint of what `loader` counts through.
        """
        final = self.folder / _name(step)
        writing = final.with_name(final.name + ".writing")
        if dist.get_rank() == 0:
            for left_behind in self.folder.glob("*.writing"):  # by a process that died while it wrote
                shutil.rmtree(left_behind)
        dist.barrier()
        state = {"loader": dict(loader), "dataset": dataset}
        engine.save_checkpoint(str(writing), tag=_ENGINE, client_state=state, save_latest=False)
        weights = {name: safe_get_full_fp32_param(parameter) for name, parameter in engine.module.named_parameters()}
        if dist.get_rank() == 0:
            save_file({name: tensor.cpu() for name, tensor in weights.items()}, writing / _WEIGHTS)
            for script in writing.glob("*.py"):  # DeepSpeed's converters, which fail on what it just wrote
                script.unlink()
        dist.barrier()
        if dist.get_rank() == 0:
            for path in [*writing.rglob("*"), writing]:
                _sync(path)
            writing.rename(final)
            _sync(self.folder)
            for old in self.steps()[:-keep]:
                shutil.rmtree(self.folder / _name(old))
        dist.barrier()

    def load(self, engine: Any, step: int, dataset: str) -> LoaderState:
        """Puts the checkpoint of `step` into `engine`.

        Raises:
            CheckpointError: written by another number of ranks, or over another dataset than `dataset`.
        """
        folder = self.folder / _name(step)
        writers = len(list((folder / _ENGINE).glob("*zero_pp_rank_*_optim_states.pt")))  # each rank wrote its part
        if writers != dist.get_world_size():
            raise CheckpointError(
                f"{folder} was written by {writers} ranks and cannot be loaded by {dist.get_world_size()}; "
                f"start the run with {writers} ranks"
            )
        _, state = engine.load_checkpoint(str(folder), tag=_ENGINE)
        if state["dataset"] != dataset:
            raise CheckpointError(
                f"{folder} was trained on another dataset than the one that lies there now (fingerprint "
                f"{state['dataset'][:12]}, now {dataset[:12]}); put the old one back or start a new run"
            )
        return state["loader"]

    def weights(self, step: int) -> dict[str, Tensor]:
        """The float32 weights under the reference's names, whatever number of ranks wrote them."""
        return load_file(self.folder / _name(step) / _WEIGHTS)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
