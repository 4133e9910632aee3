"""SampleOrder: a permutation per epoch, computed at any position without a table."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maelstream.pipeline.order import SampleOrder, _blocks_of


def epoch_of(order: SampleOrder, epoch: int) -> np.ndarray:
    return order.at(np.full(order.size, epoch), np.arange(order.size))


@given(size=st.integers(1, 3000), seed=st.integers(-(2**63), 2**64 - 1), epoch=st.integers(0, 10**6))
def test_every_sample_comes_once_per_epoch(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(epoch_of(SampleOrder(size, seed), epoch)), np.arange(size))


@given(st.data())
def test_a_position_is_computed_without_the_others(data: st.DataObject) -> None:
    order = SampleOrder(data.draw(st.integers(1, 2000)), seed=3)
    positions = np.array(data.draw(st.lists(st.integers(0, order.size - 1), min_size=1, max_size=20)))
    epochs = np.array(data.draw(st.lists(st.integers(0, 5), min_size=len(positions), max_size=len(positions))))
    alone = [order.at(epochs[k : k + 1], positions[k : k + 1])[0] for k in range(len(positions))]
    assert order.at(epochs, positions).tolist() == alone


def test_epochs_and_seeds_give_unrelated_orders() -> None:
    orders = [epoch_of(SampleOrder(5000, seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    for number, left in enumerate(orders):
        for right in orders[:number]:
            # Random permutations agree at one position on average; Poisson(1) reaches 12 with probability 1e-10.
            assert (left == right).sum() < 12


def orders_of(size: int, epochs: int, seed: int) -> np.ndarray:
    """Samples by epoch and position, (epochs, size)."""
    positions = np.tile(np.arange(size), epochs)
    return SampleOrder(size, seed).at(np.repeat(np.arange(epochs), size), positions).reshape(epochs, size)


def assert_equally_likely(values: np.ndarray, outcomes: int, freedom: int) -> None:
    """Fails for 1 of a million fair samples: chi-square's quantile by Wilson and Hilferty."""
    expected = len(values) / outcomes
    counts = np.unique(values, return_counts=True)[1]
    chi_square = ((counts - expected) ** 2 / expected).sum() + (outcomes - len(counts)) * expected
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 4.75 * np.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("seed", [0, 1, 2**63])
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_permutation_of_a_small_set_is_equally_likely(size: int, seed: int) -> None:
    """A Feistel network of 16 values gives permutations of 5 at 0.72 to 1.53 of their share."""
    orders = orders_of(size, 60_000, seed)
    permutations = math.factorial(size)
    assert_equally_likely(orders @ size ** np.arange(size), permutations, permutations - 1)


@pytest.mark.parametrize("size", [6, 8, 12, 16, 17, 24, 32, 33, 48, 64, 65])
def test_samples_and_pairs_of_samples_are_equally_likely_at_every_position(size: int) -> None:
    """The network of 16 values fails for 6 to 16; larger ones pass."""
    orders = orders_of(size, 40_000, 0)
    for position in (0, size // 2, size - 1):
        assert_equally_likely(orders[:, position], size, size - 1)
    for first, second in ((0, 1), (0, size - 1), (size // 2 - 1, size // 2), (size - 2, size - 1)):
        pairs = size * (size - 1)
        assert_equally_likely(orders[:, first] * size + orders[:, second], pairs, pairs - 1)


def test_few_blocks_are_shuffled_uniformly() -> None:
    """Three blocks of 128 samples, of which the last has 44."""
    order, first = SampleOrder(300, 0, "block"), []
    for epoch in range(600):
        blocks = _blocks_of(order.size, order.seed, epoch).order
        first.append(blocks @ 3 ** np.arange(3))
    assert_equally_likely(np.array(first), 6, 5)


def test_samples_move_as_far_as_in_a_uniform_shuffle() -> None:
    """Mean displacement of a uniform shuffle of n is n/3 (a 1,024-sample shuffle buffer reaches 736 of 6,667)."""
    size = 20_000
    displacement = np.abs(epoch_of(SampleOrder(size, 5), 0) - np.arange(size)).mean()
    assert abs(displacement / (size / 3) - 1) < 0.02


@settings(max_examples=20)
@given(position=st.integers(0, 10**9 - 1))
def test_a_billion_samples_need_no_table(position: int) -> None:
    assert 0 <= SampleOrder(10**9, 0).at(np.array([7]), np.array([position]))[0] < 10**9


def test_the_order_is_pinned() -> None:
    """If these numbers change, old runs resume with other samples."""
    assert epoch_of(SampleOrder(20, seed=0), 0).tolist() == [
        11,
        15,
        5,
        4,
        7,
        17,
        13,
        2,
        9,
        18,
        16,
        14,
        19,
        12,
        8,
        1,
        6,
        0,
        3,
        10,
    ]
    assert epoch_of(SampleOrder(12, seed=0), 0).tolist() == [3, 8, 0, 5, 11, 9, 1, 10, 2, 7, 6, 4]
    positions = np.array([0, 4999, 17, 2500])
    assert SampleOrder(5000, 3, "block").at(np.array([0, 0, 2, 2]), positions).tolist() == [2642, 3390, 3764, 2080]


def test_positions_out_of_range_are_rejected() -> None:
    with pytest.raises(IndexError, match=r"0\.\.4"):
        SampleOrder(5, 0).at(np.array([0]), np.array([5]))


@given(size=st.integers(1, 6000), seed=st.integers(0, 1000), epoch=st.integers(0, 100))
def test_a_block_shuffle_has_each_sample_once_and_superblocks_of_16_blocks(size: int, seed: int, epoch: int) -> None:
    order = SampleOrder(size, seed, "block")
    samples, epochs, positions = epoch_of(order, epoch), np.full(size, epoch), np.arange(size)
    assert np.array_equal(np.sort(samples), positions)
    superblocks = order.superblocks(epochs, positions)
    for number in range(superblocks.max() + 1):
        first, end = order.superblock_bounds(epoch, number)
        assert np.array_equal(np.flatnonzero(superblocks == number), np.arange(first, end))
        blocks, counts = np.unique(samples[first:end] // 128, return_counts=True)
        assert len(blocks) <= 16 and np.array_equal(counts, np.minimum(size - blocks * 128, 128))
    assert order.superblock_bounds(epoch, superblocks.max() + 1) == (size, size)


def test_a_block_shuffle_moves_blocks_and_samples_within_them() -> None:
    """Blocks move as far as in a uniform shuffle, and neighbours rarely stay neighbours."""
    order, size = SampleOrder(50_000, 1, "block"), 50_000
    samples = epoch_of(order, 0)
    assert abs(np.abs(samples - np.arange(size)).mean() / (size / 3) - 1) < 0.1
    assert (np.diff(samples) == 1).mean() < 0.002
    assert not np.array_equal(samples, epoch_of(order, 1))


def test_without_a_shuffle_samples_come_in_packed_order() -> None:
    assert epoch_of(SampleOrder(100, 1, "none"), 3).tolist() == list(range(100))
