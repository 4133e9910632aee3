"""`maelstream scratch TRAIN VAL --run DIR`: trains a classifier without pre-training, the baseline."""

import maelstream.jobs.distributed.parent_death  # noqa: F401  before anything slow is imported

# isort: split
import sys

from maelstream.jobs.command import run
from maelstream.jobs.evaluation.classify import classify


def main(args: list[str]) -> int:
    """Runs `maelstream scratch`; 0 when the run reached its end or --stop-at-step."""
    return classify("scratch", args)


if __name__ == "__main__":
    sys.exit(run("scratch", sys.argv[1:]))
