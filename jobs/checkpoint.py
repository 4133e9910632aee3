"""Checkpoints of a run: `checkpoints/step-00001234/`, whole or absent.

It holds `weights.safetensors`, the float32 weights merged (DeepSpeed's own converter, `zero_to_fp32`, refuses what its
bf16 optimizer writes), `state.json`, and `engine/`, DeepSpeed's files, one a rank. All is written into a folder of
another name that is synced to the disk and then renamed: a crash at any moment leaves the older checkpoints as they
were. DeepSpeed's own `latest` file is not used: where it is missing, DeepSpeed starts again from step 0 without a word.
"""

import contextlib
import io
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.loader import LoaderState
from shards.durable import sync
from shards.errors import MaelstreamError

_WEIGHTS, _ENGINE, _STATE = "weights.safetensors", "engine", "state.json"
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(MaelstreamError):
    """A run without a checkpoint, or one that this start cannot load."""


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run; `save` and `load` are called by all ranks together."""

    folder: Path

    def at(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps with a whole checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))

    def save(
        self, engine: Any, weights: dict[str, Tensor], step: int, loader: LoaderState, dataset: str, keep: int
    ) -> None:
        """Writes the state after `step` steps, then drops all but the `keep` newest checkpoints.

        `weights` are the merged float32 ones, on rank 0; `dataset` is the fingerprint of what `loader` counts through.
        """
        final = self.at(step)
        writing = final.with_name(final.name + ".writing")
        if dist.get_rank() == 0:
            for left_behind in self.folder.glob("*.writing"):  # by a process that died while it wrote
                shutil.rmtree(left_behind)
        dist.barrier()
        engine.save_checkpoint(str(writing), tag=_ENGINE, save_latest=False)
        if dist.get_rank() == 0:
            state = {"loader": loader, "dataset": dataset, "world_size": dist.get_world_size()}
            (writing / _STATE).write_text(json.dumps(state))
            save_file(weights, writing / _WEIGHTS)
            for script in writing.glob("*.py"):  # DeepSpeed's converters, which fail on what it just wrote
                script.unlink()
        dist.barrier()
        if dist.get_rank() == 0:
            for path in [*writing.rglob("*"), writing]:
                sync(path)
            writing.rename(final)
            sync(self.folder)
            for old in self.steps()[:-keep]:
                shutil.rmtree(self.at(old))
        dist.barrier()

    def loader_state(self, step: int, dataset: str, world_size: int) -> LoaderState:
        """Where the data path stood at `step`.

        Raises:
            CheckpointError: written by other than `world_size` ranks, or over another dataset than `dataset`.
        """
        folder = self.at(step)
        state = json.loads((folder / _STATE).read_text())
        if state["world_size"] != world_size:
            raise CheckpointError(
                f"{folder} was written by {state['world_size']} ranks and cannot be loaded by {world_size}; "
                f"start the run with {state['world_size']} ranks"
            )
        if state["dataset"] != dataset:
            raise CheckpointError(
                f"{folder} was trained on another dataset than the one that lies there now (fingerprint "
                f"{state['dataset'][:12]}, now {dataset[:12]}); put the old one back or start a new run"
            )
        return state["loader"]

    def load(self, engine: Any, step: int) -> None:
        """Puts weights and optimizer state of `step` into `engine`."""
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints a line of its own debugging a rank
            engine.load_checkpoint(str(self.at(step)), tag=_ENGINE)

    def weights(self, step: int) -> dict[str, Tensor]:
        """The float32 weights under the reference's names, whatever number of ranks wrote them."""
        return load_file(self.at(step) / _WEIGHTS)
