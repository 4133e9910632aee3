"""`maelstream finetune WEIGHTS TRAIN VAL --run DIR`: trains a pre-trained encoder and a classifier on labels."""

import jobs.orphan  # noqa: F401  before anything slow is imported

# isort: split
import sys

from jobs.classify import classify
from jobs.command import run


def main(args: list[str]) -> int:
    """`maelstream finetune`; 0 when the run reached its end or --stop-at-step."""
    return classify("finetune", args)


if __name__ == "__main__":
    sys.exit(run("finetune", sys.argv[1:]))
