"""`maelstream finetune WEIGHTS TRAIN VAL --run DIR`: trains a pre-trained encoder and a classifier on labels."""

import maelstream.jobs.distributed.parent_death  # noqa: F401  before anything slow is imported

# isort: split
import sys

from maelstream.jobs.command import run
from maelstream.jobs.evaluation.classify import classify


def main(args: list[str]) -> int:
    """Runs `maelstream finetune`; 0 when the run reached its end or --stop-at-step."""
    return classify("finetune", args)


if __name__ == "__main__":
    sys.exit(run("finetune", sys.argv[1:]))
