"""`maelstream evaluate WEIGHTS VAL`: top-1 and top-5 of a trained classifier on every image of a packed dataset.

WEIGHTS is a run of finetune, linprobe, partial or scratch, finished or not: its newest good checkpoint is evaluated. It
may also be a file of a fine-tuned ViT with timm's or the reference's names, whose sizes follow from its tensors.
"""

import maelstream.jobs.distributed.parent_death  # noqa: F401  before anything slow is imported

# isort: split
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from maelstream.jobs.arguments import parse_arguments
from maelstream.jobs.command import run
from maelstream.jobs.evaluation.options import EvaluationOptions
from maelstream.shards.dataset import Dataset


@dataclass(frozen=True)
class Evaluate(EvaluationOptions):
    """Evaluate a trained classifier on every image of a packed dataset."""

    weights: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WEIGHTS")]
    """A run of finetune, linprobe, partial or scratch, or a file of a classifier's weights."""
    val: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAL")]
    """A packed dataset with labels. Its classes are those that the classifier was trained on, in the same order."""


def main(args: list[str]) -> int:
    """Runs `maelstream evaluate`; returns 0 when the result is written."""
    command = parse_arguments(Evaluate, args, "evaluate")
    dataset = Dataset.open(command.val)
    from maelstream.jobs.evaluation.evaluating import evaluate  # torch, DALI and DeepSpeed take seconds to import

    evaluate(command.weights, dataset, command)
    return 0


if __name__ == "__main__":
    sys.exit(run("evaluate", sys.argv[1:]))
