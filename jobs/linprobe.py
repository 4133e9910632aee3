"""`maelstream linprobe WEIGHTS TRAIN VAL --run DIR`: trains linear layers on the features of a frozen encoder."""

import maelstream.jobs.distributed.parent_death  # noqa: F401  before anything slow is imported

# isort: split
import sys

from maelstream.jobs.command import run
from maelstream.jobs.evaluation.classify import classify


def main(args: list[str]) -> int:
    """Runs `maelstream linprobe`; 0 when the run reached its end or --stop-at-step."""
    return classify("linprobe", args)


if __name__ == "__main__":
    sys.exit(run("linprobe", sys.argv[1:]))
