"""Checkpoints of a run, `checkpoints/step-00001234/`: complete or absent, and every byte is verified before loading.

    weights.safetensors           merged float32 weights under the reference's names; export and reconstruct read them
    ema.safetensors               the same for the EMA of the weights, in runs that keep one
    moments-00000-of-00002.safetensors ...     the optimizer's moments, by parameter and position, one file per rank
    state.json                    the position of the data path, and the number of optimizer steps
    manifest.json                 size and SHA-256 of each file; written last

Nothing in it depends on the number of ranks or the ZeRO stage that wrote it, so any other number and stage can resume
from it (jobs/checkpointing/partition.py). A folder gets its final name when all of its files are on the disk
(jobs/checkpointing/saver.py); then the file `newest` names it. A damaged checkpoint is renamed to `step-XXXXXXXX.bad`,
and the next older one is used.
"""

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from maelstream.jobs.checkpointing.digest import Digest, digest_of
from maelstream.jobs.distributed.errors import AgreedError
from maelstream.shards.durable import atomic_write, sync

if TYPE_CHECKING:
    from torch import Tensor

    from maelstream.jobs.checkpointing.partition import Partition
    from maelstream.jobs.distributed.ranks import ControlGroup
    from maelstream.pipeline.loader import LoaderState

WEIGHTS, STATE, MANIFEST, NEWEST = "weights.safetensors", "state.json", "manifest.json", "newest"
FILES = {"weight": WEIGHTS, "ema": "ema.safetensors"}
"""Names of the files with merged tensors, by kind."""
_FORMAT = 1
_NAME = re.compile(r"step-([0-9]{8})")


class CheckpointError(AgreedError):
    """The run has no checkpoint that this start can load."""


class State(TypedDict):
    """What a checkpoint holds in addition to tensors."""

    loader: "LoaderState"
    dataset: str
    """Fingerprint of the dataset that the position in `loader` refers to."""
    optimizer_steps: int
    world_size: int
    """Number of ranks that wrote it."""


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run."""

    folder: Path

    def at(self, step: int) -> Path:
        """Folder of the checkpoint of `step`."""
        return self.folder / f"step-{step:08d}"

    @staticmethod
    def is_name(name: str) -> bool:
        """Whether `name` is that of a complete checkpoint's folder."""
        return _NAME.fullmatch(name) is not None

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending.

        Raises:
            CheckpointError: the folder of checkpoints is a file, or a link to a folder that does not exist now.
        """
        if not self.folder.is_dir():
            if self.folder.exists():
                raise CheckpointError(f"{self.folder} is not a folder; restore it, or remove it to start from step 0")
            if self.folder.is_symlink():  # a run that seems to have no checkpoint would start again from step 0
                raise CheckpointError(
                    f"{self.folder} is a link to {self.folder.readlink()}, which is no folder; mount its disk or "
                    "correct the link"
                )
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))

    def step_of(self, path: Path) -> int | None:
        """Step of the checkpoint folder `path`, or of a file in one; None for any other path."""
        if path.is_file():
            path = path.parent
        return next((step for step in self.steps() if self.at(step).resolve() == path.resolve()), None)

    def fault(self, step: int, share: int = 0, shares: int = 1) -> str:
        """Describes what is wrong with a checkpoint; "" if nothing.

        Reads every `shares`-th file of it, starting at number `share`.
        """
        return checkpoint_fault(self.at(step), step, share, shares)

    def size_fault(self, step: int) -> str:
        """Like `fault`, but compares only the sizes of the files."""
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

    def newest_good(
        self, control_group: "ControlGroup", aside: bool = True, below: int | None = None
    ) -> tuple[int, list[str]]:
        """Step of the newest good checkpoint (0 for a run without any), and messages about the bad ones.

        Each rank verifies its share of the files, and a checkpoint is good if all ranks find no fault. Bad checkpoints
        are renamed to `.bad` if `aside`; pass False when another process may be training the run. With `below`,
        only checkpoints of earlier steps are considered.

        Raises:
            CheckpointError: there are checkpoints, and none is good.
        """
        pointer = self.folder / NEWEST
        view = json.dumps(
            [self.steps(), pointer.read_bytes()[:100].decode("ascii", "replace") if pointer.is_file() else ""]
        )
        steps, named = json.loads(control_group.text_of_first(view))
        named, messages = named.strip(), []
        if below is not None:
            steps, named = [step for step in steps if step < below], ""
        if named and not self.is_name(named):
            messages.append(f"{pointer} is damaged: it names no checkpoint")
        elif named and named not in {self.at(step).name for step in steps}:
            messages.append(f"{self.folder} has no {named}, which its file `{NEWEST}` names")
        for step in reversed(steps):
            faults = control_group.all_texts(self.fault(step, control_group.ranks.rank, control_group.ranks.world_size))
            if not any(faults):
                return step, [f"{message}; resuming from {self.at(step).name}" for message in messages]
            messages.append(f"{self.at(step)}: {next(filter(None, faults))}")
            if aside and control_group.ranks.rank == 0:
                put_aside(self.at(step))
        if messages:
            raise CheckpointError(
                f"{'; '.join(messages)}; no checkpoint is good: restore one, or remove "
                f"{self.folder} to start from step 0"
            )
        return 0, []

    def state(self, step: int, dataset: str) -> State:
        """Reads the state of the checkpoint of `step`.

        Raises:
            CheckpointError: it was trained on another dataset.
            ValueError: the file is not a state.
        """
        state: State
        try:
            state = json.loads((self.at(step) / STATE).read_bytes())
            loader = state["loader"]
            counts = (loader["epoch"], loader["position"], state["optimizer_steps"], state["world_size"])
            whole = isinstance(state["dataset"], str) and all(type(count) is int and count >= 0 for count in counts)
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole or state["optimizer_steps"] > step:
            raise ValueError(f"{STATE} is not the state of a run at step {step:,}")
        if state["dataset"] != dataset:
            raise CheckpointError(
                f"{self.at(step)} was trained on another dataset (fingerprint {state['dataset'][:12]}, now "
                f"{dataset[:12]}); restore the old dataset or start a new run"
            )
        return state

    def weights(self, step: int, kind: str = "weight") -> "dict[str, Tensor]":
        """The float32 weights, or their EMA, under the reference's names; the number of ranks does not matter."""
        from safetensors.torch import load_file

        return load_file(self.at(step) / FILES[kind])

    def tensor_fault(
        self, step: int, trained: Mapping[str, tuple[int, ...]], frozen: Mapping[str, tuple[int, ...]], ema: bool
    ) -> str:
        """Describes which tensor of a checkpoint is missing, or does not have the shape of the model's; "" if none.

        `trained` and `frozen` are shapes by name; `ema` is whether the run keeps an EMA. Reads only the files' headers.
        """
        from safetensors import SafetensorError, safe_open

        from maelstream.jobs.checkpointing.tensor_writer import fragments_of

        try:
            for file in (FILES[kind] for kind in ("weight", "ema") if kind == "weight" or ema):
                with safe_open(self.at(step) / file, "pt") as opened:
                    found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                    for name, shape in {**trained, **frozen}.items():
                        if name not in found:
                            return f"{file} lacks {name}"
                        kind, size = found[name].get_dtype(), tuple(found[name].get_shape())
                        if (kind, size) != ("F32", shape):
                            return f"{file}: {name} is {kind} of shape {size}, the model's is F32 of shape {shape}"
            with fragments_of(sorted(self.at(step).glob("moments-*.safetensors"))) as moments:
                return moments.fault({name: math.prod(shape) for name, shape in trained.items()})
        except (OSError, ValueError, SafetensorError) as error:
            return f"its tensors cannot be read ({error})"

    def restore(self, step: int, state: State, partition: "Partition") -> None:
        """Loads this rank's part of the float32 weights, EMA and moments of `step` into `partition`."""
        from maelstream.jobs.checkpointing.tensor_writer import fragments_of

        weights = {kind: self.weights(step, kind) for kind in partition.weights}
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
        """Writes the manifest of a folder whose files are on the disk, renames it and lets `newest` point to it."""
        manifest = {"format": _FORMAT, "step": step, "files": {name: asdict(value) for name, value in digests.items()}}
        with atomic_write(writing / MANIFEST) as file:
            file.write(json.dumps(manifest, separators=(",", ":")).encode())
        writing.rename(self.at(step))
        sync(self.folder)
        with atomic_write(self.folder / NEWEST) as file:
            file.write(f"{self.at(step).name}\n".encode())

    def prune(self, keep: int, keep_every_steps: int) -> None:
        """Deletes all but the `keep` newest checkpoints and those of every `keep_every_steps` steps (0: none)."""
        for old in self.steps()[:-keep]:
            if not keep_every_steps or old % keep_every_steps:
                removed = self.at(old).with_suffix(".removed")  # a half-deleted one must not look like a damaged one
                self.at(old).rename(removed)
                remove(removed)
        for bad in self.folder.glob("step-*.bad"):
            if self.is_name(bad.stem) and int(bad.stem.removeprefix("step-")) <= self.steps()[-1]:
                remove(bad)  # the run has passed this step again

    def sweep(self) -> None:
        """Deletes what processes left that died while writing; no other process may be writing."""
        for leftover in [*self.folder.glob("*.writing"), *self.folder.glob("*.removed")]:
            remove(leftover)


def checkpoint_fault(folder: Path, step: int | None = None, share: int = 0, shares: int = 1, only: str = "") -> str:
    """Describes what is wrong with the checkpoint in `folder`; "" if nothing.

    Reads every `shares`-th file of it, starting at number `share`, or `only` the file of that name. Compares `step`, if
    given, with the manifest's.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != _FORMAT or step not in (None, manifest["step"]):
            return f"{MANIFEST} is of format {manifest['format']} and step {manifest['step']}"
        files = {name: Digest(**digest) for name, digest in manifest["files"].items()}
        for name in [only] if only else sorted(files)[share::shares]:
            path, digest = folder / name, files[name]
            if path.stat().st_size != digest.bytes:
                return f"{name} has {path.stat().st_size:,} bytes instead of {digest.bytes:,}"
            if digest_of(path) != digest:
                return f"{name} is damaged: its SHA-256 differs from that in {MANIFEST}"
    except OSError as error:
        return f"{Path(error.filename or MANIFEST).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return ""


def put_aside(path: Path) -> Path:
    """Renames a damaged file, folder or link to `NAME.bad`, in place of an older one, and returns the new path."""
    aside = path.with_name(f"{path.name}.bad")
    remove(aside)
    return path.rename(aside)


def remove(path: Path) -> None:
    """Deletes a folder with all that is in it, or a file; of a link, the link alone. Nothing at `path` is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
