"""A synthetic run folder for tests of reports."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from maelstream.jobs.checkpointing.digest import digest_of
from maelstream.jobs.checkpointing.store import MANIFEST, WEIGHTS
from maelstream.jobs.distributed.ranks import Ranks
from maelstream.jobs.evaluation.results import Evaluation, record
from maelstream.jobs.recipe import load_recipe
from maelstream.jobs.reporting.reconstruction_files import ReconstructionInfo, write_reconstructions
from maelstream.jobs.run_folder.environment import record_start
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.status import Status
from maelstream.model.mae import Reconstruction
from maelstream.pipeline.sample_source import BadSample


def reconstruction(count: int, brightness: float, side: int = 32) -> Reconstruction:
    """Reconstructions of uniform images, each version with its own brightness."""
    levels = (0.2, 0.5, brightness, (0.2 + brightness) / 2)
    original, masked, reconstructed, pasted = (torch.full((count, 3, side, side), level) for level in levels)
    return Reconstruction(original, masked, reconstructed, pasted, torch.tensor(brightness))


def make_run(path: Path, recipe: str) -> RunFolder:
    """40 steps with one skipped; reconstructions by own and by other weights; an intact and a damaged checkpoint."""
    folder = RunFolder(path)
    folder.start(load_recipe(Path(recipe)), 0)
    lines: list[dict[str, Any]] = []
    for step in range(1, 41):
        loss = 0.4 + math.exp(-step / 10)
        lines.append({"step": step, "epoch": step / 5, "loss": loss, "lr": 1e-3 * math.sin(step / 13), "spike": False})
        lines[-1] |= {"grad_norm": 1 / step, "images_per_s": 900.0 + step, "data_wait": 0.01, "memory_gib": 1.5}
        lines[-1] |= {"skipped": int(step >= 15)}
    lines[14] |= {"loss": None, "grad_norm": None}
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    Status("stopped", 40, 60, 2, "SIGTERM").write(folder.status)
    record_start(folder, 0, Ranks(0, 2, 0, 2))
    starts = json.loads(folder.environment.read_text())
    folder.environment.write_text(json.dumps([starts[0] | {"command": "maelstream pretrain tiny.yaml"}]))
    own: list[tuple[str, int | None, str]] = [(f"step-{step:08d}", step, "own") for step in (4, 8, 12)]
    for number, (name, step_of_weights, images) in enumerate([*own, ("mae-x", None, "x")]):
        results = {"0.75": reconstruction(2, 0.3 + number / 10), "0.85": reconstruction(2, 0.35 + number / 10)}
        info = ReconstructionInfo.describe(results, name, step_of_weights, images, ("a", "b"), "normalised_pixel")
        write_reconstructions(folder.reconstructions / name, results, info)
    for step, content in ((4, b"123"), (8, b"1234")):
        checkpoint = folder.checkpoints.at(step)
        checkpoint.mkdir(parents=True)
        (checkpoint / WEIGHTS).write_bytes(b"1234")
        digest = digest_of(checkpoint / WEIGHTS)
        manifest = {"format": 1, "step": step, "files": {WEIGHTS: {"bytes": digest.bytes, "sha256": digest.sha256}}}
        (checkpoint / MANIFEST).write_text(json.dumps(manifest))
        (checkpoint / WEIGHTS).write_bytes(content)
    folder.quarantine(BadSample(7, "a.tar", "000000007", "not a JPEG"))
    record(
        Evaluation(
            job="linprobe",
            name="linprobe",
            top1=41.2,
            top5=71.2,
            images=10_000,
            epochs=20,
            step=147,
            weights=str(path),
            train="train",
            val="val",
            folder=str(path / "probe"),
            settings={"lr": 0.1, "pool": "cls"},
            finished=1.0,
        ),
        path,
    )
    return folder
