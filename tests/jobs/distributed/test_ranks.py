"""Ranks: one alone leaves nothing in the environment that a process started later would take for its own."""

import os

from maelstream.jobs.distributed.ranks import process_group, ranks_from_environment


def test_a_rank_alone_leaves_the_environment_as_it_was() -> None:
    before = dict(os.environ)
    for _ in range(2):
        with process_group(ranks_from_environment(), 60) as control_group:
            assert control_group.sums([2.5]) == [2.5] and os.environ["WORLD_SIZE"] == "1"
        assert dict(os.environ) == before
