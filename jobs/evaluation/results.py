"""Results of evaluations: one `Evaluation` per finished fine-tuning, probe, `evaluate` or `knn`.

Each is written as `result.json` in the folder of the evaluation. If the weights belong to a run, it is also appended to
that run's `evaluations.jsonl`. That line is written last: if the process is killed in between, the same command
finishes the evaluation. If several lines name the same folder, the last one counts.
"""

import fcntl
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from maelstream.shards.durable import atomic_write, can_write, sync
from maelstream.shards.errors import MaelstreamError

Job = Literal["knn", "linprobe", "partial", "finetune", "scratch", "evaluate"]
JOBS: tuple[Job, ...] = ("knn", "linprobe", "partial", "finetune", "scratch", "evaluate")
RESULT, LINES = "result.json", "evaluations.jsonl"


@dataclass(frozen=True)
class Scores:
    """The scores of one classifier on a whole validation set."""

    top1: float
    """Percent of `images`, as `top5`."""
    top5: float
    images: int
    """All images of the validation set."""
    undecodable: tuple[str, ...] = ()
    """One text per image that could not be decoded, with the reason. Such images count as wrong."""


@dataclass(frozen=True)
class Evaluation:
    """The content of `result.json`: a result, and the weights and data that it belongs to."""

    job: Job
    name: str
    """Name in tables."""
    top1: float
    """Percent of all validation images, as `top5`."""
    top5: float
    images: int
    """Validation images, including those that could not be decoded."""
    epochs: float | None
    """Epochs of training on labels; None when nothing was trained."""
    step: int | None
    """Pre-training step of the weights; None when it is unknown."""
    weights: str
    """As named in the command, as are `train` and `val`; "" when there are none."""
    train: str
    val: str
    folder: str
    """The folder of `result.json`."""
    settings: dict[str, Any]
    """Options and details, such as blocks, lr and pool."""
    finished: float
    """End of the evaluation, in seconds since 1970."""


def read_evaluations(folder: Path) -> list[Evaluation]:
    """The evaluations of a run: its own result, if it is an evaluation itself, then those of its weights, oldest first.

    A last line that a crash left incomplete is ignored.

    Raises:
        MaelstreamError: a file that `record` did not write, or a damaged one.
    """
    found = []
    if (result := folder / RESULT).exists():
        found.append(_parsed(result.read_bytes(), f"{result}"))
    if (lines := folder / LINES).exists():
        complete = lines.read_bytes().rpartition(b"\n")[0]
        found += [_parsed(line, f"{lines}, line {number}") for number, line in enumerate(complete.splitlines(), 1)]
    return list({evaluation.folder: evaluation for evaluation in found}.values())


def record_scores(
    scores: Scores,
    run: Path | None,
    *,
    job: Job,
    name: str,
    weights: str,
    train: str,
    val: str,
    folder: Path,
    settings: dict[str, Any],
    step: int | None,
    epochs: float | None = None,
    left_out: tuple[str, ...] = (),
) -> Evaluation:
    """Records `scores` as an evaluation that ends now and returns it; call it on one rank.

    It reports every undecodable image on stderr: those of `scores`, and the training images in `left_out`. The other
    arguments are the fields of `Evaluation`, or go to `record`, whose errors it raises.
    """
    for text in scores.undecodable:
        print(f"maelstream {job}: counted as wrong: {text}", file=sys.stderr)
    for text in left_out:
        print(f"maelstream {job}: left out: {text}", file=sys.stderr)
    evaluation = Evaluation(
        job=job,
        name=name,
        top1=scores.top1,
        top5=scores.top5,
        images=scores.images,
        epochs=epochs,
        step=step,
        weights=weights,
        train=train,
        val=val,
        folder=str(folder),
        settings=settings | {"undecodable": [*scores.undecodable, *left_out]},
        finished=time.time(),
    )
    record(evaluation, run)
    return evaluation


def record(evaluation: Evaluation, run: Path | None) -> None:
    """Writes `result.json`, and appends a line to the evaluations of `run`, if the weights belong to one.

    Only one rank calls it.

    Raises:
        MaelstreamError: a file that cannot be written.
    """
    folder = Path(evaluation.folder)
    line = json.dumps(asdict(evaluation)).encode() + b"\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / RESULT) as file:
            file.write(line)
        if run is not None and not can_write(run):
            print(f"{run} belongs to another user, so its {LINES} does not list {folder}", file=sys.stderr)
        elif run is not None:
            _append(run / LINES, line)
    except OSError as error:
        raise MaelstreamError(
            f"{error.filename or folder} cannot be written ({error.strerror}); free disk space and evaluate again"
        ) from None


def best_of_each(evaluations: list[Evaluation]) -> str:
    """The best top-1 per job, as one line of text: "linprobe 68.0, finetune 83.6"."""
    best = {
        job: max((evaluation.top1 for evaluation in evaluations if evaluation.job == job), default=None) for job in JOBS
    }
    return ", ".join(f"{job} {top1:.1f}" for job, top1 in best.items() if top1 is not None)


def _append(path: Path, line: bytes) -> None:
    new = not path.exists()
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # several evaluations of a run may end at the same time
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # an incomplete line of a crash would corrupt this one
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync(path.parent)


def _parsed(text: bytes, where: str) -> Evaluation:
    try:
        return TypeAdapter(Evaluation).validate_json(text)
    except ValueError:
        raise MaelstreamError(f"{where} is damaged, or of another version; remove it and evaluate again") from None
