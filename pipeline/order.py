"""Sample order: which sample stands at each position of an epoch, as a pure function of (seed, epoch, position).

`global`: a keyed bijection over 0..n-1 (a Feistel network, cycle-walked into range: Black and Rogaway, CT-RSA 2002), so
any position is computed without the ones before it and without a table: O(1) memory for any n. `block`, for disks and
stores that want long reads: blocks of consecutive samples are shuffled, then the samples inside a window of blocks.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Int64

from maelstream.pipeline.hashing import mix, sample_keys, seed_word

_ROUNDS = 6
_BLOCK, _WINDOW = 128, 16  # samples a block, blocks a window: 14 and 225 MB of ImageNet

Shuffle = Literal["global", "block", "none"]


@dataclass(frozen=True)
class SampleOrder:
    """The order of `size` samples, another one each epoch unless `shuffle` is "none"."""

    size: int
    seed: int
    shuffle: Shuffle = "global"

    def at(self, epochs: Int64[np.ndarray, "b"], positions: Int64[np.ndarray, "b"]) -> Int64[np.ndarray, "b"]:
        """Samples at `positions` of `epochs`; each of 0..size-1 comes exactly once an epoch."""
        if positions.size and not (0 <= positions.min() and positions.max() < self.size):
            raise IndexError(f"positions {positions.min()}..{positions.max()} are not all in 0..{self.size - 1}")
        if self.shuffle == "none":
            return positions.astype(np.int64)
        if self.shuffle == "global":
            return _permuted(positions, np.full_like(positions, self.size), seed_word(self.seed, "order"), epochs)
        samples = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = _blocks_of(self.size, self.seed, int(epoch)).at(positions[here])
        return samples

    def of_line(self, line: Int64[np.ndarray, "b"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epoch, position in it and sample for places of the endless line of epochs."""
        epochs, positions = np.divmod(line, self.size)
        return epochs, positions, self.at(epochs, positions)

    def windows(self, epochs: Int64[np.ndarray, "b"], positions: Int64[np.ndarray, "b"]) -> Int64[np.ndarray, "b"]:
        """Number of the window in which each position of a block shuffle lies."""
        found = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = _blocks_of(self.size, self.seed, int(epoch)).windows(positions[here])
        return found

    def window(self, epoch: int, number: int) -> tuple[int, int]:
        """First position of a block shuffle's window, and the one after its last; they are equal beyond the epoch."""
        return _blocks_of(self.size, self.seed, epoch).window(number)


@dataclass(frozen=True, eq=False)
class _Blocks:
    """One epoch of a block shuffle."""

    order: Int64[np.ndarray, "blocks"]  # which block comes first, second, ...
    ends: Int64[np.ndarray, "blocks"]  # the position after each, as they come
    word: np.ndarray

    def windows(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.ends, positions, "right") // _WINDOW

    def window(self, number: int) -> tuple[int, int]:
        edges = np.append(0, self.ends)
        first, last = (min(block, len(self.ends)) for block in (number * _WINDOW, (number + 1) * _WINDOW))
        return int(edges[first]), int(edges[last])

    def at(self, positions: np.ndarray) -> np.ndarray:
        edges, windows = np.append(0, self.ends), self.windows(positions)
        starts = edges[windows * _WINDOW]
        sizes = edges[np.minimum((windows + 1) * _WINDOW, len(self.ends))] - starts
        shuffled = starts + _permuted(positions - starts, sizes, self.word, windows)
        place = np.searchsorted(self.ends, shuffled, "right")
        return self.order[place] * _BLOCK + shuffled - edges[place]


@lru_cache(4)
def _blocks_of(size: int, seed: int, epoch: int) -> _Blocks:
    count = -(-size // _BLOCK)
    numbers, epochs = np.arange(count), np.full(count, epoch)
    order = _permuted(numbers, np.full(count, count), seed_word(seed, "blocks"), epochs)
    ends = np.cumsum(np.where(order == count - 1, size - (count - 1) * _BLOCK, _BLOCK))
    word = sample_keys(seed_word(seed, "window"), np.array([epoch]), np.array([0]))
    return _Blocks(order, ends, word)


def _permuted(values: np.ndarray, sizes: np.ndarray, word: np.ndarray, tweaks: np.ndarray) -> Int64[np.ndarray, "b"]:
    """Each value under a permutation of 0..size-1, another one for each tweak."""
    # each domain, 4**half_bits, is below 4 * size
    half_bits = np.maximum(1, (_bit_length(sizes - 1) + 1) // 2).astype(np.uint64)
    permuted, walking = values.astype(np.uint64), np.arange(values.size)
    while walking.size:  # out of range: permute again; the walk ends, since it runs on the cycle of its start
        permuted[walking] = _feistel(permuted[walking], tweaks[walking], word, half_bits[walking])
        walking = walking[permuted[walking] >= sizes[walking].astype(np.uint64)]
    return permuted.astype(np.int64)


def _bit_length(values: np.ndarray) -> np.ndarray:
    """As `int.bit_length`, below 2**53."""
    return np.frexp(values.astype(np.float64))[1]


def _feistel(values: np.ndarray, tweaks: np.ndarray, word: np.ndarray, half_bits: np.ndarray) -> np.ndarray:
    """A permutation of 0..4**half_bits-1 for each tweak; `values` uint64 (b,)."""
    half_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & half_mask
    for number in range(_ROUNDS):
        round_keys = sample_keys(word, tweaks, np.full_like(tweaks, number))  # (B,)
        left, right = right, left ^ (mix(right ^ round_keys) & half_mask)
    return (left << half_bits) | right
