"""Checkpoints of a run: `checkpoints/step-00001234/`, whole or absent, and never loaded before every byte is checked.

    weights.safetensors           float32, merged, under the reference's names: what export and reconstruct take
    ema.safetensors               likewise their mean over steps, of runs that keep one
    moments-00000-of-00002.safetensors ...     the optimizer's moments, by parameter name and place, a file a rank
    state.json                    where the data path stood, and the number of optimizer steps
    manifest.json                 size and SHA-256 of each of them; written last

Nothing of it depends on the number of ranks or the ZeRO stage that wrote it: any other number and stage goes on from
it (`maelstream.jobs.checkpointing.partition`). A folder gets its name when all of it is on the disk (`maelstream.jobs.checkpointing.saver`); then the file `newest` names
it. One that is found damaged is put aside as `step-XXXXXXXX.bad`, and the next older one is taken.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from safetensors.torch import load_file
from torch import Tensor

from maelstream.jobs.checkpointing.partition import MEAN, Partition
from maelstream.jobs.checkpointing.tensor_writer import Digest, digest_of, fragments_of
from maelstream.jobs.distributed.ranks import AgreedError, ControlGroup
from maelstream.pipeline.loader import LoaderState
from maelstream.shards.durable import sync, written_whole

WEIGHTS, STATE, MANIFEST, NEWEST = "weights.safetensors", "state.json", "manifest.json", "newest"
FILES = {"weight": WEIGHTS, MEAN: "ema.safetensors"}
"""Of tensors that are merged, by kind."""
_FORMAT = 1
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(AgreedError):
    """A run without a checkpoint that this start can load."""


class State(TypedDict):
    """What a checkpoint knows beside tensors."""

    loader: LoaderState
    dataset: str
    """Fingerprint of what `loader` counts through."""
    optimizer_steps: int
    world_size: int
    """Ranks that wrote it."""


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run."""

    folder: Path

    def at(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps with a checkpoint that was whole when it got its name, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))

    def step_of(self, path: Path) -> int | None:
        """Step of the checkpoint that `path` is, or a file in it; None where it is none of these."""
        path = path.resolve()
        if path.is_file():
            path = path.parent
        match = _NAME.fullmatch(path.name)
        return int(match[1]) if match and path.parent == self.folder.resolve() else None

    def fault(self, step: int, share: int = 0, shares: int = 1, only: str = "") -> str:
        """What is wrong with a checkpoint, "" if nothing.

        Of its files every `shares`th from `share` on is read, or `only` one.
        """
        try:
            manifest = json.loads((self.at(step) / MANIFEST).read_text())
            if (manifest["format"], manifest["step"]) != (_FORMAT, step):
                return f"{MANIFEST} is of format {manifest['format']} and step {manifest['step']}"
            files = {name: Digest(**digest) for name, digest in manifest["files"].items()}
            for name in [only] if only else sorted(files)[share::shares]:
                path, digest = self.at(step) / name, files[name]
                if path.stat().st_size != digest.bytes:
                    return f"{name} has {path.stat().st_size:,} bytes instead of {digest.bytes:,}"
                if digest_of(path) != digest:
                    return f"{name} is damaged: its SHA-256 is another than {MANIFEST}'s"
        except OSError as error:
            return f"{Path(error.filename or MANIFEST).name}: {error.strerror}"
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{MANIFEST} cannot be read"
        return ""

    def size_fault(self, step: int) -> str:
        """As `fault`, from the sizes of the files alone."""
        try:
            files = json.loads((self.at(step) / MANIFEST).read_text())["files"]
            for name, digest in sorted(files.items()):
                if (size := (self.at(step) / name).stat().st_size) != digest["bytes"]:
                    return f"{name} has {size:,} bytes instead of {digest['bytes']:,}"
        except OSError as error:
            return f"{Path(error.filename or MANIFEST).name}: {error.strerror}"
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{MANIFEST} cannot be read"
        return ""

    def newest_good(self, control_group: ControlGroup, put_aside: bool = True) -> tuple[int, list[str]]:
        """Step of the newest checkpoint that all ranks together find whole, 0 for a run without any; and what to tell.

        Each rank reads its share of the files; one verdict is made of what they find. Bad ones are put aside, unless
        another process may be training the run.

        Raises:
            CheckpointError: there were some, and none is good.
        """
        pointer = self.folder / NEWEST
        view = json.dumps([self.steps(), pointer.read_text(errors="replace").strip() if pointer.exists() else ""])
        steps, named = json.loads(control_group.text_of_first(view))
        told = []
        if named and named not in {self.at(step).name for step in steps}:
            told.append(f"{self.folder} has no {named}, which its file `{NEWEST}` names")
        for step in reversed(steps):
            faults = control_group.all_texts(self.fault(step, control_group.ranks.rank, control_group.ranks.world_size))
            if not any(faults):
                return step, [f"{fault}; going on from {self.at(step).name}" for fault in told]
            told.append(f"{self.at(step)}: {next(filter(None, faults))}")
            if put_aside and control_group.ranks.rank == 0:
                aside = self.at(step).with_suffix(".bad")
                shutil.rmtree(aside, ignore_errors=True)
                self.at(step).rename(aside)
        if told:
            raise CheckpointError(
                f"{'; '.join(told)}; there is no good checkpoint: put one back, or remove {self.folder} to start anew"
            )
        return 0, []

    def state(self, step: int, dataset: str) -> State:
        """What the checkpoint of `step` knows; CheckpointError when it counts through another dataset."""
        state: State = json.loads((self.at(step) / STATE).read_text())
        if state["dataset"] != dataset:
            raise CheckpointError(
                f"{self.at(step)} was trained on another dataset than the one that lies there now (fingerprint "
                f"{state['dataset'][:12]}, now {dataset[:12]}); put the old one back or start a new run"
            )
        return state

    def weights(self, step: int, kind: str = "weight") -> dict[str, Tensor]:
        """The float32 weights, or their mean, under the reference's names, whatever number of ranks wrote them."""
        return load_file(self.at(step) / FILES[kind])

    def restore(self, step: int, state: State, partition: Partition) -> None:
        """Puts this rank's part of the float32 weights, their mean and moments of `step` into `partition`."""
        weights = {kind: self.weights(step, kind) for kind in partition.weights}  # mapped: only what is touched is read
        with fragments_of(sorted(self.at(step).glob("moments-*.safetensors"))) as moments:
            values = {}
            for piece in partition.pieces:
                for kind in weights:
                    flat = weights[kind][piece.name].view(-1)
                    values[kind, piece] = flat[piece.start : piece.start + piece.size]
                for kind in partition.moments:
                    values[kind, piece] = moments.read(kind, piece.name, piece.start, piece.size)
            partition.fill(state["optimizer_steps"], values)

    def publish(self, writing: Path, step: int, digests: dict[str, Digest]) -> None:
        """Gives a folder whose files are on the disk its manifest and its name, and lets `newest` name it."""
        manifest = {"format": _FORMAT, "step": step, "files": {name: asdict(value) for name, value in digests.items()}}
        with written_whole(writing / MANIFEST) as file:
            file.write(json.dumps(manifest, separators=(",", ":")).encode())
        writing.rename(self.at(step))
        sync(self.folder)
        with written_whole(self.folder / NEWEST) as file:
            file.write(f"{self.at(step).name}\n".encode())

    def prune(self, keep: int, keep_every_steps: int) -> None:
        """Leaves the `keep` newest checkpoints and those of every `keep_every_steps` steps (0: none)."""
        for old in self.steps()[:-keep]:
            if not keep_every_steps or old % keep_every_steps:
                going = self.at(old).with_suffix(".removed")  # a half-removed one must not be taken for a damaged one
                self.at(old).rename(going)
                shutil.rmtree(going)
        for bad in self.folder.glob("step-*.bad"):
            if int(bad.stem.removeprefix("step-")) <= self.steps()[-1]:
                shutil.rmtree(bad)  # the run has come past it again

    def sweep(self) -> None:
        """Removes what processes left behind that died while they wrote; nobody else may be writing."""
        for left_behind in [*self.folder.glob("*.writing"), *self.folder.glob("*.removed")]:
            if left_behind.is_dir():
                shutil.rmtree(left_behind)
            else:
                left_behind.unlink()
