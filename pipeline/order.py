"""Sample order: which sample is at each position of an epoch, as a pure function of (seed, epoch, position).

`global`: a keyed bijection over 0..n-1 (a Feistel network, cycle-walked into range: Black and Rogaway, CT-RSA 2002).
Any position is computed without the ones before it and without a table: O(1) memory for any n. Up to 16 values, where
such a network is biased (docs/pipeline.md), a value's image is the rank of its hash: every permutation is equally
likely. `block`, for disks and object stores that are fast only with long reads: blocks of consecutive samples are
shuffled, then the samples inside each superblock, which is 16 blocks in a row of that shuffle.

Epochs follow one another without end. A global position counts over all of them: epoch * size + position.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from maelstream.pipeline.config import Shuffle
from maelstream.pipeline.hashing import mix_bits, sample_keys, seed_word

_ROUNDS = 6
_RANKED = 16  # sets up to this size are permuted by rank; a change reorders the samples of old runs
_BLOCK = 128  # samples per block: 14 MB of ImageNet
_SUPERBLOCK = 16  # blocks per superblock: 225 MB of ImageNet


@dataclass(frozen=True)
class SampleOrder:
    """The order of `size` samples; a different one each epoch unless `shuffle` is "none"."""

    size: int
    seed: int
    shuffle: Shuffle = "global"

    def at(self, epochs: Int64[np.ndarray, "b"], positions: Int64[np.ndarray, "b"]) -> Int64[np.ndarray, "b"]:
        """Samples at `positions` of `epochs`; each of 0..size-1 comes exactly once per epoch.

        Raises:
            IndexError: a position outside 0..size-1.
        """
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

    def lookup(self, global_positions: Int64[np.ndarray, "b"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epochs, positions in them, and samples at these global positions; three int64 arrays (b,)."""
        epochs, positions = np.divmod(global_positions, self.size)
        return epochs, positions, self.at(epochs, positions)

    def superblocks(self, epochs: Int64[np.ndarray, "b"], positions: Int64[np.ndarray, "b"]) -> Int64[np.ndarray, "b"]:
        """Number of the superblock that contains each position of a block shuffle."""
        found = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = _blocks_of(self.size, self.seed, int(epoch)).superblocks(positions[here])
        return found

    def superblock_bounds(self, epoch: int, number: int) -> tuple[int, int]:
        """First position of a superblock and the one after its last; they are equal beyond the end of the epoch."""
        return _blocks_of(self.size, self.seed, epoch).superblock_bounds(number)


@dataclass(frozen=True, eq=False)
class _Blocks:
    """One epoch of a block shuffle."""

    order: Int64[np.ndarray, "blocks"]  # block numbers in shuffled order
    ends: Int64[np.ndarray, "blocks"]  # the position after each of them
    word: np.ndarray

    def superblocks(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.ends, positions, "right") // _SUPERBLOCK

    def superblock_bounds(self, number: int) -> tuple[int, int]:
        edges = np.append(0, self.ends)
        first, last = (min(block, len(self.ends)) for block in (number * _SUPERBLOCK, (number + 1) * _SUPERBLOCK))
        return int(edges[first]), int(edges[last])

    def at(self, positions: np.ndarray) -> np.ndarray:
        edges, superblocks = np.append(0, self.ends), self.superblocks(positions)
        starts = edges[superblocks * _SUPERBLOCK]
        sizes = edges[np.minimum((superblocks + 1) * _SUPERBLOCK, len(self.ends))] - starts
        shuffled = starts + _permuted(positions - starts, sizes, self.word, superblocks)
        block_index = np.searchsorted(self.ends, shuffled, "right")  # in the shuffled order
        return self.order[block_index] * _BLOCK + shuffled - edges[block_index]


@lru_cache(4)
def _blocks_of(size: int, seed: int, epoch: int) -> _Blocks:
    count = -(-size // _BLOCK)
    numbers, epochs = np.arange(count), np.full(count, epoch)
    order = _permuted(numbers, np.full(count, count), seed_word(seed, "blocks"), epochs)
    ends = np.cumsum(np.where(order == count - 1, size - (count - 1) * _BLOCK, _BLOCK))
    word = sample_keys(seed_word(seed, "window"), np.array([epoch]), np.array([0]))
    return _Blocks(order, ends, word)


def _permuted(values: np.ndarray, sizes: np.ndarray, word: np.ndarray, tweaks: np.ndarray) -> Int64[np.ndarray, "b"]:
    """Applies a permutation of 0..size-1 to each value; every tweak selects a different permutation."""
    permuted, small = values.astype(np.int64), sizes <= _RANKED
    permuted[small] = _ranks(values[small], sizes[small], word, tweaks[small])
    large = np.flatnonzero(~small)
    permuted[large] = _walked(values[large], sizes[large], word, tweaks[large])
    return permuted


def _ranks(values: np.ndarray, sizes: np.ndarray, word: np.ndarray, tweaks: np.ndarray) -> np.ndarray:
    """The rank of each value's hash among the hashes of 0..size-1, which are all different."""
    own, ranks = sample_keys(word, tweaks, values), np.zeros(len(values), np.int64)
    for other in range(sizes.max(initial=0)):
        ranks += (other < sizes) & (sample_keys(word, tweaks, np.full_like(tweaks, other)) < own)
    return ranks


def _walked(values: np.ndarray, sizes: np.ndarray, word: np.ndarray, tweaks: np.ndarray) -> np.ndarray:
    """The Feistel network's image of each value, applied again until it is below `size`."""
    # The Feistel domain, 4**half_bits values, is smaller than 4 * size.
    half_bits = np.maximum(1, (_bit_length(sizes - 1) + 1) // 2).astype(np.uint64)
    permuted, walking = values.astype(np.uint64), np.arange(values.size)
    while walking.size:  # out of range: permute again; the walk ends because it follows a cycle of the permutation
        permuted[walking] = _feistel(permuted[walking], tweaks[walking], word, half_bits[walking])
        walking = walking[permuted[walking] >= sizes[walking].astype(np.uint64)]
    return permuted.astype(np.int64)


def _bit_length(values: np.ndarray) -> np.ndarray:
    """`int.bit_length` of each value; exact below 2**53."""
    return np.frexp(values.astype(np.float64))[1]


def _feistel(values: np.ndarray, tweaks: np.ndarray, word: np.ndarray, half_bits: np.ndarray) -> np.ndarray:
    """A permutation of 0..4**half_bits-1 for each tweak; `values` uint64 (b,)."""
    half_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & half_mask
    for number in range(_ROUNDS):
        round_keys = sample_keys(word, tweaks, np.full_like(tweaks, number))  # (B,)
        left, right = right, left ^ (mix_bits(right ^ round_keys) & half_mask)
    return (left << half_bits) | right
