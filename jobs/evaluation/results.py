"""What a run's weights are worth: one `Evaluation` for each fine-tuning, probing or look at neighbours that ended.

It lies as `result.json` in the folder of the evaluation and, where the weights are a run's, as a line of that run's
`evaluations.jsonl`. The line comes last: an evaluation that is killed in between is finished by the same command again,
and of several lines about one folder the last counts.
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

from maelstream.shards.durable import sync, written_whole
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
    """A result and what it is of."""

    job: Job
    name: str
    """What a table calls it."""
    top1: float
    """Percent of all validation images, as `top5`."""
    top5: float
    images: int
    """Validation images, those that could not be decoded among them."""
    epochs: float | None
    """Of training on labels; None where nothing was trained."""
    step: int | None
    """Of pre-training that the weights are of; None where nobody tells."""
    weights: str
    """As they were named in the command, as `train` and `val`; "" where there are none."""
    train: str
    val: str
    folder: str
    """Where `result.json` lies."""
    settings: dict[str, Any]
    """What was chosen: blocks, lr, pool and the like."""
    finished: float
    """Seconds since 1970."""


def read_evaluations(folder: Path) -> list[Evaluation]:
    """Of the run in `folder`: its own result, if it is an evaluation itself, then those of its weights, oldest first.

    Raises:
        MaelstreamError: a file that is not what `record` writes; a last line that a crash cut short is left out.
    """
    found = []
    if (result := folder / RESULT).exists():
        found.append(_parsed(result.read_bytes(), f"{result}"))
    if (lines := folder / LINES).exists():
        whole = lines.read_bytes().rpartition(b"\n")[0]
        found += [_parsed(line, f"{lines}, line {number}") for number, line in enumerate(whole.splitlines(), 1)]
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
    """Writes `result.json`, and the line of the `run` that the weights are of; one rank does it for all.

    Raises:
        MaelstreamError: the disk does not take it.
    """
    folder = Path(evaluation.folder)
    line = json.dumps(asdict(evaluation)).encode() + b"\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / RESULT) as file:
            file.write(line)
        if run is not None:
            _append(run / LINES, line)
    except OSError as error:
        raise MaelstreamError(
            f"{error.filename or folder} cannot be written ({error.strerror}); make room and evaluate again"
        ) from None


def best_of_each(evaluations: list[Evaluation]) -> str:
    """The best top-1 of each job, in a line: "linprobe 68.0, finetune 83.6"."""
    best = {
        job: max((evaluation.top1 for evaluation in evaluations if evaluation.job == job), default=None) for job in JOBS
    }
    return ", ".join(f"{job} {top1:.1f}" for job, top1 in best.items() if top1 is not None)


def _append(path: Path, line: bytes) -> None:
    new = not path.exists()
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # several evaluations of a run may end at once
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # what a crash cut short would spoil this line, too
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
