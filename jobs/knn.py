"""`maelstream knn WEIGHTS TRAIN VAL`: top-1 and top-5 by nearest neighbours in frozen features, without training."""

import maelstream.jobs.distributed.parent_death  # noqa: F401  before anything slow is imported

# isort: split
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from maelstream.jobs.arguments import parse_arguments
from maelstream.jobs.command import run
from maelstream.jobs.evaluation.options import KnnOptions
from maelstream.shards.dataset import Dataset


@dataclass(frozen=True)
class Knn(KnnOptions):
    """Classify validation images by their nearest training images in the features of a frozen encoder."""

    weights: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WEIGHTS")]
    """A run's folder, whose newest checkpoint is used, or a file or folder of weights."""
    train: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TRAIN")]
    """A packed dataset with labels."""
    val: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAL")]
    """A packed dataset with the same classes, to evaluate on."""


def main(args: list[str]) -> int:
    """Runs `maelstream knn`; returns 0 when the result is written."""
    command = parse_arguments(Knn, args, "knn")
    train_set, val_set = Dataset.open(command.train), Dataset.open(command.val)
    from maelstream.jobs.evaluation.nearest_neighbours import evaluate_neighbours  # imports torch, DALI

    evaluate_neighbours(command.weights, train_set, val_set, command)
    return 0


if __name__ == "__main__":
    sys.exit(run("knn", sys.argv[1:]))
