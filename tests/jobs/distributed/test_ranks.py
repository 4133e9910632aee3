"""A single rank leaves no variables in the environment, which a process started later would read as its rank."""

import os

from maelstream.jobs.distributed.ranks import process_group, ranks_from_environment


def test_a_single_rank_restores_the_environment() -> None:
    before = dict(os.environ)
    for _ in range(2):
        with process_group(ranks_from_environment(), 60) as control_group:
            assert control_group.sums([2.5]) == [2.5] and os.environ["WORLD_SIZE"] == "1"
        assert dict(os.environ) == before
