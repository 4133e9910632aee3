"""`maelstream partial WEIGHTS TRAIN VAL --blocks K --run DIR`: only the last K blocks are trained (paper, figure 9)."""

import maelstream.jobs.distributed.parent_death  # noqa: F401  before anything slow is imported

# isort: split
import sys

from maelstream.jobs.command import run
from maelstream.jobs.evaluation.classify import classify


def main(args: list[str]) -> int:
    """Runs `maelstream partial`; 0 when the run reached its end or --stop-at-step."""
    return classify("partial", args)


if __name__ == "__main__":
    sys.exit(run("partial", sys.argv[1:]))
