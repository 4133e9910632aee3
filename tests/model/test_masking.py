"""Masks: uniform, independent, and bit-identical on every device and in every version."""

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from maelstream.model.config import MaskKind, keep_count
from maelstream.model.masking import Mask, block_mask, draw_mask, gather_patches, grid_mask, mask_by_score, random_mask

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
KINDS: tuple[MaskKind, ...] = ("random", "block", "grid")
PINNED_BLOCKS = [
    "..............",
    "..............",
    ".....########.",
    ".....########.",
    ".....########.",
    ".....########.",
    ".....########.",
    "..##.########.",
    ".....########.",
    ".....########.",
    ".....########.",
    ".....########.",
    ".....########.",
    ".....########.",
]


def mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser as published, on uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_keys(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-(2**63), 2**63, count))


def kept_matrix(keys: torch.Tensor, num_patches: int, keep: int) -> np.ndarray:
    mask = random_mask(keys, num_patches, keep)
    return torch.zeros(len(keys), num_patches).scatter_(1, mask.kept, 1.0).numpy()


@pytest.mark.parametrize("num_patches", [1, 16, 196, 256])
def test_the_hash_equals_splitmix64_on_uint64(num_patches: int) -> None:
    keys = torch.cat([random_keys(50), torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])])
    unsigned = mix(keys.numpy().view(np.uint64) ^ np.uint64(0x7061746368657300))[:, None]
    numbers = np.arange(num_patches, dtype=np.uint64)
    hashes = mix(unsigned + (numbers + np.uint64(1)) * GOLDEN_GAMMA)
    expected = np.argsort(hashes >> np.uint64(17), axis=1, kind="stable")
    mask = random_mask(keys, num_patches, num_patches)
    assert np.array_equal(mask.kept, expected)


def test_masks_equal_pinned_values() -> None:
    mask = random_mask(torch.tensor([0, 1, -1, 123456789012345678]), 16, 4)
    assert mask.kept.tolist() == [[13, 8, 5, 14], [7, 13, 0, 11], [10, 3, 2, 7], [4, 6, 13, 7]]
    mask = random_mask(torch.tensor([2**63 - 1, -(2**63)]), 196, 49)
    assert mask.kept[:, :8].tolist() == [[61, 17, 40, 94, 140, 49, 116, 7], [61, 28, 19, 164, 151, 167, 47, 3]]


def test_a_mask_splits_the_patches_and_restores_their_order() -> None:
    mask = random_mask(random_keys(64), 196, 49)
    both = torch.cat([mask.kept, mask.removed], dim=1)
    everything = torch.arange(196).expand(64, -1)
    assert mask.kept.shape == (64, 49)
    assert mask.removed.shape == (64, 147)
    assert torch.equal(both.sort(dim=1).values, everything)
    assert torch.equal(both.gather(1, mask.restore), everything)


def test_the_mask_of_a_key_does_not_depend_on_the_rest_of_the_batch() -> None:
    keys = random_keys(32)
    together = random_mask(keys, 196, 49)
    alone = [random_mask(key[None], 196, 49) for key in keys]
    for name in together._fields:
        assert torch.equal(getattr(together, name), torch.cat([getattr(mask, name) for mask in alone]))


def test_masks_neither_use_nor_advance_the_generators_of_torch() -> None:
    torch.manual_seed(1)
    first = random_mask(random_keys(4), 64, 16)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = random_mask(random_keys(4), 64, 16)
    assert torch.equal(first.kept, second.kept)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_patch_is_kept_equally_often() -> None:
    keys, num_patches, keep = 40_000, 196, 49
    counts = kept_matrix(random_keys(keys), num_patches, keep).sum(0)
    rate = keep / num_patches
    # Counts of one mask sum to `keep`, so this statistic is chi-square with L - 1 degrees of freedom: mean 195,
    # standard deviation 19.7; a deviation of five of these has a probability of about 3e-6.
    chi_square = ((counts - keys * rate) ** 2 / (keys * rate * (1 - rate))).sum() * (num_patches - 1) / num_patches
    assert abs(chi_square - 195) < 5 * math.sqrt(2 * 195)


def test_pairs_of_patches_are_kept_as_in_a_draw_without_replacement() -> None:
    keys, num_patches, keep = 40_000, 49, 12
    kept = kept_matrix(random_keys(keys, seed=1), num_patches, keep)
    pairs = (kept.T @ kept)[np.triu_indices(num_patches, 1)]
    rate = keep * (keep - 1) / (num_patches * (num_patches - 1))  # a draw without replacement
    deviations = (pairs - keys * rate) / math.sqrt(keys * rate * (1 - rate))
    assert abs(deviations).max() < 5  # over 1,176 pairs; the probability that one exceeds 5 is 7e-4
    assert 0.85 < deviations.std() < 1.15


@pytest.mark.parametrize("name", ["consecutive", "one bit apart", "a gamma apart"])
def test_masks_of_close_keys_are_unrelated(name: str) -> None:
    numbers = torch.arange(4_000)
    keys, others = {
        "consecutive": (numbers, numbers + 1),
        "one bit apart": (random_keys(4_000), random_keys(4_000) ^ (1 << numbers % 64)),
        "a gamma apart": (numbers, numbers + (0x9E3779B97F4A7C15 - 2**64)),
    }[name]
    overlap = (kept_matrix(keys, 196, 49) * kept_matrix(others, 196, 49)).sum(1)
    # Hypergeometric: 49 x 49 / 196 = 12.25 patches in common, variance 12.25 x 0.75 x 147 / 195.
    deviation = math.sqrt(12.25 * 0.75 * 147 / 195)
    assert abs(overlap.mean() - 12.25) < 5 * deviation / math.sqrt(4_000)
    assert 0.9 < overlap.std() / deviation < 1.1


def test_all_masks_of_a_small_grid_are_equally_frequent() -> None:
    masks = np.sort(random_mask(random_keys(60_000, seed=2), 6, 3).kept.numpy(), axis=1)
    counts = np.array(list(Counter(map(tuple, masks)).values()))
    assert len(counts) == math.comb(6, 3)
    # 19 degrees of freedom: mean 19, deviation 6.2
    assert ((counts - 3_000) ** 2 / 3_000).sum() < 19 + 5 * math.sqrt(2 * 19)


def test_compiled_masks_are_bit_identical() -> None:
    def all_kinds(keys: torch.Tensor) -> list[Mask]:
        return [draw_mask(kind, keys, (14, 14), 49) for kind in KINDS]

    keys = random_keys(16)
    for compiled, eager in zip(torch.compile(all_kinds, fullgraph=True)(keys), all_kinds(keys), strict=True):
        assert all(torch.equal(*pair) for pair in zip(compiled, eager, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draw", [draw_mask, torch.compile(draw_mask, fullgraph=True)], ids=["eager", "compiled"])
def test_the_gpu_draws_the_same_masks(draw: Callable[..., Mask], kind: MaskKind) -> None:
    keys = random_keys(512)
    for actual, expected in zip(
        draw(kind, keys.cuda(), (14, 14), 49), draw_mask(kind, keys, (14, 14), 49), strict=True
    ):
        assert torch.equal(actual.cpu(), expected)


def removed_grids(mask: Mask, grid: tuple[int, int]) -> np.ndarray:
    """Arrays (B, rows, columns) that are 1 where a patch is removed."""
    removed = torch.zeros(len(mask.removed), grid[0] * grid[1]).scatter_(1, mask.removed, 1.0)
    return removed.unflatten(1, grid).numpy()


def equal_neighbours(removed: np.ndarray) -> float:
    """Share of adjacent patches that are both removed or both kept."""
    return float(
        np.concatenate(
            [(removed[:, 1:] == removed[:, :-1]).ravel(), (removed[:, :, 1:] == removed[:, :, :-1]).ravel()]
        ).mean()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_every_kind_depend_only_on_the_key(kind: MaskKind) -> None:
    keys = random_keys(32, seed=3)
    together = draw_mask(kind, keys, (6, 8), 12)
    torch.manual_seed(7)
    alone = [draw_mask(kind, key[None], (6, 8), 12) for key in keys]
    for name in together._fields:
        assert torch.equal(getattr(together, name), torch.cat([getattr(mask, name) for mask in alone]))
    assert torch.equal(torch.cat([together.kept, together.removed], 1).gather(1, together.restore)[0], torch.arange(48))
    assert len(np.unique(removed_grids(together, (6, 8)), axis=0)) >= (4 if kind == "grid" else 32)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_a_block_mask_equals_a_pinned_one(default: torch.dtype) -> None:
    """The expected mask is a literal, so a change by device, torch version or default dtype is noticed."""
    torch.set_default_dtype(default)
    try:
        (removed,) = removed_grids(block_mask(torch.tensor([2024]), (14, 14), 98), (14, 14))
    finally:
        torch.set_default_dtype(torch.float32)
    assert ["".join(".#"[int(patch)] for patch in row) for row in removed] == PINNED_BLOCKS


@pytest.mark.parametrize(("grid", "keep"), [((14, 14), 49), ((14, 14), 98), ((16, 16), 64), ((6, 10), 15), ((4, 4), 4)])
def test_block_masks_remove_blocks_and_the_exact_number_of_patches(grid: tuple[int, int], keep: int) -> None:
    num_patches = grid[0] * grid[1]
    mask = block_mask(random_keys(2_000), grid, keep)
    removed = removed_grids(mask, grid)
    assert mask.kept.shape[1] == keep
    assert (removed.sum((1, 2)) == num_patches - keep).all()
    rates = removed.mean(0)
    assert 0 < rates.min() and rates.max() < 1  # every patch is removed sometimes, and kept sometimes
    scattered = removed_grids(random_mask(random_keys(2_000), num_patches, keep), grid)
    # In random masks, neighbours are equal by chance: K(K-1) + R(R-1) of L(L-1). In blocks, most of them are.
    chance = (keep * (keep - 1) + (num_patches - keep) * (num_patches - keep - 1)) / (num_patches * (num_patches - 1))
    assert equal_neighbours(scattered) == pytest.approx(chance, abs=0.01)
    assert equal_neighbours(removed) > 1 - (1 - chance) / 2


def test_blocks_have_the_log_uniform_aspect_ratio_of_beit() -> None:
    """If 16 patches are removed, the first block has all 16, so its sides show its aspect ratio."""
    removed = removed_grids(block_mask(random_keys(4_000, seed=5), (14, 14), 180), (14, 14))
    heights, widths = removed.any(2).sum(1), removed.any(1).sum(1)
    # Ratios 0.790 to 1.306 give 4 x 4 (from 1.266 a 5 x 4 block that is cut); tolerance: 5 standard deviations.
    square = ((heights == 4) & (widths == 4)).mean()
    assert square == pytest.approx(math.log(1.306 / 0.790) / math.log(1 / 0.3**2), abs=0.032)
    assert (widths > heights).mean() == pytest.approx((heights > widths).mean(), abs=0.06)


def test_48_blocks_remove_enough_patches_in_nearly_every_image() -> None:
    """At the paper's sizes there are almost no removed patches whose four neighbours are all kept."""
    for keep in (49, 98):
        removed = np.pad(
            removed_grids(block_mask(random_keys(4_000, seed=6), (14, 14), keep), (14, 14)), ((0, 0), (1, 1), (1, 1))
        )
        neighbours = removed[:, 2:, 1:-1] + removed[:, :-2, 1:-1] + removed[:, 1:-1, 2:] + removed[:, 1:-1, :-2]
        isolated = ((neighbours == 0) & (removed[:, 1:-1, 1:-1] == 1)).any((1, 2))
        assert isolated.mean() < 0.05  # a last block that is cut to one patch counts as well


def test_a_grid_mask_keeps_the_same_patch_of_each_2_x_2() -> None:
    keys, grid = random_keys(8_000), (6, 8)
    kept = 1 - removed_grids(grid_mask(keys, grid, 12), grid)
    cells = kept.reshape(-1, 3, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(len(keys), 12, 4)
    assert (cells.sum(2) == 1).all()
    assert (cells == cells[:, :1]).all()
    counts = cells[:, 0].sum(0)  # each corner is kept in a quarter of the images: chi-square, 3 degrees of freedom
    assert ((counts - 2_000) ** 2 / 2_000).sum() < 3 + 5 * math.sqrt(2 * 3)


@pytest.mark.parametrize(
    ("grid", "keep", "message"),
    [
        ((7, 8), 14, "7 x 8 patches have an odd side"),
        ((8, 8), 32, "quarter of 64 patches, not 32; set mask_ratio to 0.75"),
    ],
)
def test_a_grid_mask_with_an_odd_side_or_another_ratio_raises(grid: tuple[int, int], keep: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid_mask(random_keys(1), grid, keep)


def test_the_patches_with_the_lowest_scores_are_kept() -> None:
    mask = mask_by_score(torch.tensor([[0.3, 0.1, 0.9, 0.2]]), 2)
    assert mask.kept.tolist() == [[1, 3]]
    assert mask.removed.tolist() == [[0, 2]]
    assert mask.restore.tolist() == [[2, 0, 3, 1]]


def test_gather_patches_returns_tokens_in_the_order_of_the_indices() -> None:
    tokens = torch.arange(12.0).reshape(1, 4, 3)
    assert gather_patches(tokens, torch.tensor([[3, 1]])).tolist() == [[[9, 10, 11], [3, 4, 5]]]


def test_the_number_of_kept_patches_is_truncated_not_rounded() -> None:
    assert [keep_count(196, 0.75), keep_count(256, 0.75), keep_count(100, 0.9), keep_count(16, 0)] == [49, 64, 9, 16]


def test_too_many_patches_for_distinct_scores_raise() -> None:
    with pytest.raises(ValueError, match="65537 patches"):
        random_mask(random_keys(1), 2**16 + 1, 1)
    with pytest.raises(ValueError, match="131072 patches"):
        block_mask(random_keys(1), (512, 256), 1)
