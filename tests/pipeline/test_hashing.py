"""The hash equals SplitMix64, and its numbers are uniform."""

import numpy as np

from maelstream.pipeline.hashing import mix_bits, sample_keys, seed_word, uniforms


def splitmix64(state: int) -> int:
    """The finaliser with Python's integers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    return state ^ (state >> 31)


def test_mix_bits_is_splitmix64() -> None:
    values = [0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]
    assert mix_bits(np.array(values, np.uint64)).tolist() == [splitmix64(value) for value in values]


def test_first_numbers_of_splitmix64_are_the_published_ones() -> None:
    """Seed 1234567 in Vigna's splitmix64.c gives 6457827717110365317, 3203168211198807973, ..."""
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + k * gamma) % 2**64 for k in (1, 2)], np.uint64)
    assert mix_bits(states).tolist() == [6457827717110365317, 3203168211198807973]


def test_no_two_samples_of_an_epoch_share_a_key() -> None:
    samples = np.arange(100_000)
    assert len(np.unique(sample_keys(seed_word(0, "mask"), np.zeros_like(samples), samples))) == len(samples)


def test_purposes_seeds_and_epochs_give_unrelated_keys() -> None:
    one = np.array([1])
    keys = {
        int(sample_keys(seed_word(seed, purpose), epoch * one, one)[0])
        for seed in (0, 1, -1)
        for purpose in ("mask", "augment")
        for epoch in (0, 1)
    }
    assert len(keys) == 12


def test_uniforms_fill_their_bins_evenly_and_their_columns_are_uncorrelated() -> None:
    """Chi-square with 99 degrees of freedom exceeds 185 with a chance below 1e-6."""
    keys = sample_keys(seed_word(0, "augment"), np.zeros(20_000, np.int64), np.arange(20_000))
    numbers = uniforms(keys, 3)
    assert numbers.min() >= 0 and numbers.max() < 1
    for column in numbers.T:
        counts = np.histogram(column, bins=100, range=(0, 1))[0]
        assert ((counts - 200) ** 2 / 200).sum() < 185
    assert np.abs(np.corrcoef(numbers.T) - np.eye(3)).max() < 5 / np.sqrt(20_000)  # five standard errors
