"""`maelstream scratch TRAIN VAL --run DIR`: trains a classifier without pre-training, the baseline."""

import jobs.orphan  # noqa: F401  before anything slow is imported

# isort: split
import sys

from jobs.classify import classify
from jobs.command import run


def main(args: list[str]) -> int:
    """`maelstream scratch`; 0 when the run reached its end or --stop-at-step."""
    return classify("scratch", args)


if __name__ == "__main__":
    sys.exit(run("scratch", sys.argv[1:]))
