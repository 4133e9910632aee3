"""A trial checks by formula whether it fits into memory."""

from maelstream.jobs.profiling.trial import fits_in_memory
from maelstream.jobs.recipe import EngineConfig, Recipe


def test_a_trial_that_cannot_fit_is_known_before_it_runs() -> None:
    assert fits_in_memory(Recipe(), 24e9)
    assert not fits_in_memory(Recipe(engine=EngineConfig(micro_batch_size=4096)), 24e9)
