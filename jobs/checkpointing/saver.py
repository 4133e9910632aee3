"""Saves checkpoints while training continues: a step pays only for a copy in memory, and threads write it to disk.

Each rank copies its partition to the host and writes its own part. When all parts are on the disk, rank 0 merges the
weights, writes the manifest and renames the folder to its final name. Ranks learn how far the others are from two of
the numbers that they sum once per step anyway, so the threads themselves never communicate.
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from maelstream.jobs.checkpointing.digest import Digest, digest_of
from maelstream.jobs.checkpointing.partition import Partition, Piece
from maelstream.jobs.checkpointing.store import FILES, STATE, CheckpointStore, State
from maelstream.jobs.checkpointing.tensor_writer import fragment, fragments_of, write_tensors
from maelstream.jobs.distributed.errors import AgreedError
from maelstream.jobs.distributed.ranks import ControlGroup
from maelstream.shards.durable import atomic_write, sync
from maelstream.shards.errors import MaelstreamError


class SaveError(AgreedError):
    """A checkpoint that could not be written."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of this rank's state in host memory."""

    pieces: list[Piece]
    flats: dict[str, list[Tensor]]
    """Flat weights and moments per kind, one tensor per partition."""
    moments: tuple[str, ...]
    """The kinds that are moments."""
    frozen: dict[str, Tensor]
    """Whole float32 tensors of the model that the optimizer does not hold, on the CPU."""

    def part(self, kind: str, piece: Piece) -> Tensor:
        """The elements of `piece`, flat."""
        return self.flats[kind][piece.flat][piece.offset : piece.offset + piece.size]


class Saver:
    """Writes the checkpoints of a run; all ranks call `save`, `advance` and `finish` at the same steps."""

    def __init__(
        self,
        store: CheckpointStore,
        control_group: ControlGroup,
        shapes: dict[str, tuple[int, ...]],
        keep: int,
        keep_every_steps: int,
        heartbeat: Callable[[], None],
        on_complete: Callable[[int], None],
    ):
        """`shapes` are the shapes of the merged tensors by name; `keep` and `keep_every_steps` go to
        `CheckpointStore.prune`. `heartbeat` is called while this rank waits for its own thread. Rank 0's thread calls
        `on_complete` with the step of each complete checkpoint.
        """
        self._store, self._control_group, self._shapes = store, control_group, shapes
        self._keep, self._keep_every_steps, self._heartbeat = keep, keep_every_steps, heartbeat
        self._on_complete = on_complete
        self._phase: Literal["idle", "parts", "publish"] = "idle"
        self._thread: threading.Thread | None = None
        self._failure = ""
        self._buffers: dict[str, list[Tensor]] = {}
        self._step = 0
        self._state: State
        self._snapshot_in_progress: Snapshot

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread still writes."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether this rank could not write its part."""
        return bool(self._failure)

    @property
    def newest(self) -> str:
        """Path of the newest complete checkpoint, or "none yet"."""
        steps = self._store.steps()
        return str(self._store.at(steps[-1])) if steps else "none yet"

    def save(self, partition: Partition, step: int, state: State, frozen: dict[str, Tensor] | None = None) -> None:
        """Copies the state of `step` and starts to write it; first waits until an earlier save is written.

        `frozen` are the tensors of the model that `partition` does not hold, whole and the same on all ranks.
        """
        self.finish()
        snapshot = self._snapshot(partition, frozen or {})
        self._step, self._state, self._phase = step, state, "parts"
        self._snapshot_in_progress = snapshot
        self._start(lambda: self._write_part(snapshot))

    def advance(self, writing: float, failed: float) -> str:
        """Starts the next phase when no rank writes any more; returns an error message, or "".

        `writing` and `failed` are the numbers of ranks that write and that have failed.
        """
        if self._phase == "idle" or writing:
            return ""
        if failed:
            texts = self._control_group.all_texts(self._failure)
            if self._control_group.ranks.rank == 0:
                shutil.rmtree(self._writing, ignore_errors=True)
            self._phase, self._failure = "idle", ""
            return f"{self._store.at(self._step)} cannot be written: {next(filter(None, texts))}"
        if self._phase == "parts":
            self._phase = "publish"
            if self._control_group.ranks.rank == 0:
                snapshot = self._snapshot_in_progress
                self._start(lambda: self._publish(snapshot))
        else:
            self._phase = "idle"
        return ""

    def finish(self) -> None:
        """Waits until the last save is on the disk; raises SaveError if it failed."""
        while self._phase != "idle":
            while self._thread is not None and self._thread.is_alive():
                self._thread.join(timeout=1)
                self._heartbeat()
            writing, failed = self._control_group.sums([float(self.is_writing), float(self.has_failed)])
            if failure := self.advance(writing, failed):
                raise SaveError(f"{failure}; the older checkpoints are whole")

    @property
    def _writing(self) -> Path:
        return self._store.at(self._step).with_suffix(".writing")

    def _start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except (OSError, MaelstreamError) as error:
                self._failure = str(error)

        self._thread = threading.Thread(target=run, name="save")
        self._thread.start()

    def _snapshot(self, partition: Partition, frozen: dict[str, Tensor]) -> Snapshot:
        """Copies into buffers that every save reuses; on a GPU they are pinned, so that copies run in parallel."""
        flats = {kind: [partition.moment(n, kind) for n in range(len(partition.flats))] for kind in partition.moments}
        flats |= partition.weights
        if not self._buffers:
            pin = torch.cuda.is_available()
            for kind, tensors in flats.items():
                self._buffers[kind] = [torch.empty(flat.shape, pin_memory=pin) for flat in tensors]
        for kind, tensors in flats.items():
            for buffer, flat in zip(self._buffers[kind], tensors, strict=True):
                buffer.copy_(flat, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return Snapshot(partition.pieces, self._buffers, partition.moments, frozen)

    def _name(self, kind: str, rank: int) -> str:
        return f"{kind}-{rank:05d}-of-{self._control_group.ranks.world_size:05d}.safetensors"

    def _write_part(self, snapshot: Snapshot) -> None:
        """Writes this rank's moments, its part of the weights, and the manifest entry of the moments."""
        rank, folder = self._control_group.ranks.rank, self._writing
        folder.mkdir(parents=True, exist_ok=True)
        digests = {}
        weights = tuple(kind for kind in FILES if kind in snapshot.flats)
        for kinds, file in ((snapshot.moments, "moments"), (weights, "weights")):
            parts = [(kind, piece) for piece in snapshot.pieces for kind in kinds]
            shapes = {fragment(kind, piece.name, piece.start): (piece.size,) for kind, piece in parts}
            path = folder / self._name(file, rank)
            digests[file] = write_tensors(path, shapes, (snapshot.part(*part) for part in parts))
        with (folder / f"{rank:05d}.json").open("w") as note:
            json.dump(asdict(digests["moments"]), note)

    def _publish(self, snapshot: Snapshot) -> None:
        """Merges the parts of all ranks into one checkpoint, on rank 0."""
        folder = self._writing
        ranks = range(self._control_group.ranks.world_size)
        notes = [folder / f"{rank:05d}.json" for rank in ranks]
        digests = {
            self._name("moments", rank): Digest(**json.loads(note.read_text()))
            for rank, note in zip(ranks, notes, strict=True)
        }
        parts = [folder / self._name("weights", rank) for rank in ranks]
        with fragments_of(parts) as weights:

            def merged(kind: str) -> Iterator[Tensor]:
                for name, shape in self._shapes.items():
                    if name in snapshot.frozen:
                        yield snapshot.frozen[name]
                    else:
                        yield weights.read(kind, name, 0, torch.Size(shape).numel())

            for kind, name in FILES.items():
                if kind in snapshot.flats:
                    digests[name] = write_tensors(folder / name, self._shapes, merged(kind))
        with atomic_write(folder / STATE) as file:
            file.write(json.dumps(self._state).encode())
        digests[STATE] = digest_of(folder / STATE)
        for part in [*parts, *notes]:
            part.unlink()
        sync(folder)
        self._store.publish(folder, self._step, digests)
        self._store.prune(self._keep, self._keep_every_steps)
        self._on_complete(self._step)
