"""Sample order: which sample stands at each position of an epoch.

A keyed bijection over 0..n-1 (a Feistel network, cycle-walked into range: Black and Rogaway, CT-RSA 2002), so any
position is computed without the ones before it and without a table: O(1) memory for any n.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from pipeline.hashing import mix, sample_keys, seed_word

_ROUNDS = 6


@dataclass(frozen=True)
class SampleOrder:
    """The shuffled order of `size` samples, another one each epoch."""

    size: int
    seed: int

    def at(self, epochs: Int64[np.ndarray, "b"], positions: Int64[np.ndarray, "b"]) -> Int64[np.ndarray, "b"]:
        """Samples at `positions` of `epochs`; each of 0..size-1 comes exactly once an epoch."""
        if positions.size and not (0 <= positions.min() and positions.max() < self.size):
            raise IndexError(f"positions {positions.min()}..{positions.max()} are not all in 0..{self.size - 1}")
        half_bits = max(1, ((self.size - 1).bit_length() + 1) // 2)  # the domain 4**half_bits is below 4 * size
        word = seed_word(self.seed, "order")
        samples = positions.astype(np.uint64)
        walking = np.arange(positions.size)
        while walking.size:  # out of range: permute again; the walk ends, since it runs on the cycle of its start
            samples[walking] = _feistel(samples[walking], epochs[walking], word, np.uint64(half_bits))
            walking = walking[samples[walking] >= self.size]
        return samples.astype(np.int64)


def _feistel(values: np.ndarray, epochs: np.ndarray, word: np.ndarray, half_bits: np.uint64) -> np.ndarray:
    """A permutation of 0..4**half_bits-1 for each epoch; `values` uint64 (b,)."""
    half_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & half_mask
    for number in range(_ROUNDS):
        round_keys = sample_keys(word, epochs, np.full_like(epochs, number))  # (B,)
        left, right = right, left ^ (mix(right ^ round_keys) & half_mask)
    return (left << half_bits) | right
