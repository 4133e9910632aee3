"""Masks: which patches of an image stay visible (paper, section 3, "Masking"; table 1f and figure 6).

The score of a patch is a hash of (key, patch index); the patches with the lowest scores are kept. The key of an image
is computed on the host from (seed, epoch, sample), so a mask is a pure function of those three. There is no generator,
no state and no copy to the device, and the CPU and the GPU draw the same bits. The hash is the finaliser of SplitMix64
(Steele et al., OOPSLA 2014) in int64 arithmetic, which wraps as uint64 does. Block and grid masks use the same hash.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor

from maelstream.model.config import MaskKind, check_grid_mask

# Unsigned constants of SplitMix64, written as the int64 of the same bits.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_FACTOR_1, _FACTOR_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
# Separates masks from anything else that is drawn from the same key; ASCII of "patches\0".
_STREAM = 0x7061746368657300
_INDEX_BITS = 16
# BEiT's blocks (Bao et al. 2021, arXiv 2106.08254, algorithm 1): fewest patches, and range of height / width.
_MIN_BLOCK, _MIN_ASPECT, _MAX_ASPECT = 16, 0.3, 1 / 0.3
_ROUNDS = 48


class Mask(NamedTuple):
    """Patch indices of a batch, split into kept and removed; all images keep the same number of patches."""

    kept: Int64[Tensor, "b k"]
    removed: Int64[Tensor, "b r"]
    restore: Int64[Tensor, "b l"]
    """Position of each patch in `cat([kept, removed])`: indexing that with `restore` restores the patch order."""


def draw_mask(kind: MaskKind, keys: Int64[Tensor, "b"], grid: tuple[int, int], keep: int) -> Mask:
    """Draw the mask of each key on a `grid` (rows, columns) of patches; equal keys give equal masks on any device.

    Raises:
        ValueError: as for `random_mask`, `block_mask` or `grid_mask`.
    """
    if kind == "block":
        return block_mask(keys, grid, keep)
    return grid_mask(keys, grid, keep) if kind == "grid" else random_mask(keys, grid[0] * grid[1], keep)


def random_mask(keys: Int64[Tensor, "b"], num_patches: int, keep: int) -> Mask:
    """Draw a uniformly random mask for each key; equal keys give equal masks on any device.

    Raises:
        ValueError: there are more than 65,536 patches, so scores would not be distinct.
    """
    _check_patch_count(num_patches)
    return mask_by_score(_hash_scores(keys, num_patches), keep)


def block_mask(keys: Int64[Tensor, "b"], grid: tuple[int, int], keep: int) -> Mask:
    """Remove blocks of patches as BEiT does (algorithm 1), until exactly `keep` patches are left.

    A block has at least 16 patches, but no more than are still to be removed. Its aspect ratio is log-uniform and its
    position uniform; blocks may overlap. Shapes are static. So the last block is cut to the required number of patches,
    dropping its last rows first, and the number of blocks is fixed at 48. If 48 blocks do not remove enough patches
    (docs/model.md says how often), random patches are removed as well.

    Raises:
        ValueError: as for `random_mask`.
    """
    _check_patch_count(grid[0] * grid[1])
    return mask_by_score(_block_scores(keys, *grid, keep), keep)


def grid_mask(keys: Int64[Tensor, "b"], grid: tuple[int, int], keep: int) -> Mask:
    """Keep one patch of each 2 x 2 cell. The key chooses which of the four; it is the same in all cells of an image.

    Raises:
        ValueError: a side of the grid is odd, or `keep` is not a quarter of its patches.
    """
    check_grid_mask(grid, keep)
    return mask_by_score(_grid_scores(keys, *grid), keep)


def mask_by_score(scores: Shaped[Tensor, "b l"], keep: int) -> Mask:
    """Keep the `keep` patches with the lowest scores in each row; scores within a row are distinct."""
    order = scores.argsort(dim=1)  # (B, L)
    # The inverse permutation, without a second argsort: element `order[i]` is i.
    positions = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    restore = torch.empty_like(order).scatter_(1, order, positions)  # (B, L)
    return Mask(order[:, :keep], order[:, keep:], restore)


def gather_patches(tokens: Float[Tensor, "b l d"], indices: Int64[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
    """The tokens of each image at `indices`, in that order."""
    return tokens.gather(1, indices[:, :, None].expand(-1, -1, tokens.shape[2]))  # (B, N, D)


def _check_patch_count(num_patches: int) -> None:
    if num_patches > 2**_INDEX_BITS:
        raise ValueError(f"{num_patches} patches; a mask covers at most {2**_INDEX_BITS}")


# Custom operators, so that torch.compile calls them as they are. Inductor's arange * GAMMA overflows in 32 bits on CUDA
# (pytorch#175966, #183901), which silently gives another mask, and corrupts the heap on a CPU (torch 2.15).
@torch.library.custom_op("maelstream::hash_scores", mutates_args=())
def _hash_scores(keys: Tensor, num_patches: int) -> Tensor:
    hashes = _hashes(keys, 0, num_patches)  # (B, L)
    # 47 random bits above the patch index: no score is negative (signed order is unsigned order) and no two are equal,
    # so every sort algorithm gives the same mask.
    return _shift_right(hashes, 17) << _INDEX_BITS | torch.arange(num_patches, device=keys.device)  # (B, L)


@torch.library.custom_op("maelstream::block_scores", mutates_args=())
def _block_scores(keys: Tensor, rows: int, columns: int, keep: int) -> Tensor:
    num_patches, removed = rows * columns, rows * columns - keep
    smallest = min(_MIN_BLOCK, removed)
    indices = torch.arange(num_patches, device=keys.device)  # (L,)
    positions = torch.stack([indices // columns, indices % columns], dim=1)  # (L, 2): row and column
    grid = torch.full_like(positions[0], rows)
    grid[1] = columns
    # Four draws of 31 bits per block, hashed from indices that no patch has: area, aspect ratio, top, left.
    draws = _shift_right(_hashes(keys, 2**_INDEX_BITS, 4 * _ROUNDS), 33).unflatten(1, (4, _ROUNDS))
    aspects = _log_uniform(draws[:, 1])  # (B, ROUNDS)
    ratios = torch.stack([aspects, 1 / aspects], dim=2)  # (B, ROUNDS, 2)
    cover = torch.full((len(keys), num_patches), _ROUNDS, device=keys.device)  # (B, L): the first block over each patch
    for block in range(_ROUNDS):
        missing = removed - (cover < _ROUNDS).sum(1, keepdim=True)  # (B, 1)
        area = smallest + (draws[:, 0, block, None] * ((missing - smallest).clamp(min=0) + 1) >> 31)
        sides = (area * ratios[:, block]).sqrt().round().long().clamp(min=1).minimum(grid)  # (B, 2)
        first = draws[:, 2:, block] * (grid + 1 - sides) >> 31
        inside = (positions >= first[:, None]) & (positions < (first + sides)[:, None])  # (B, L, 2)
        cover = torch.where(inside.all(2) & (missing > 0), cover.clamp(max=block), cover)
    # Patches of the first blocks have the highest scores; within a block, the last rows have the lowest.
    uncovered = _shift_right(_hashes(keys, 0, num_patches), 33) << _INDEX_BITS | indices
    order = torch.where(cover < _ROUNDS, num_patches - indices, uncovered)
    return (_ROUNDS - cover) << 48 | order


@torch.library.custom_op("maelstream::grid_scores", mutates_args=())
def _grid_scores(keys: Tensor, rows: int, columns: int) -> Tensor:
    indices = torch.arange(rows * columns, device=keys.device)  # (L,)
    corner = indices // columns % 2 * 2 + indices % columns % 2  # (L,): position of each patch in its cell, 0..3
    kept = _shift_right(_hashes(keys, 0, 1), 62)  # (B, 1)
    return (corner != kept).long() << _INDEX_BITS | indices  # (B, L)


@_hash_scores.register_fake
def _(keys: Tensor, num_patches: int) -> Tensor:
    return keys.new_empty(len(keys), num_patches)


@_block_scores.register_fake
def _(keys: Tensor, rows: int, columns: int, keep: int) -> Tensor:
    return keys.new_empty(len(keys), rows * columns)


@_grid_scores.register_fake
def _(keys: Tensor, rows: int, columns: int) -> Tensor:
    return keys.new_empty(len(keys), rows * columns)


def _hashes(keys: Int64[Tensor, "b"], first: int, count: int) -> Int64[Tensor, "b n"]:
    """64 random bits for each key and each of the `count` indices from `first`."""
    counters = torch.arange(first + 1, first + 1 + count, device=keys.device)
    # Hash the key before adding the counters: otherwise masks of consecutive keys would be shifts of each other.
    return _mix_bits(_mix_bits(keys ^ _STREAM)[:, None] + counters * _GAMMA)  # (B, N)


def _log_uniform(draws: Int64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """Aspect ratios, uniform in their logarithm, from draws of 31 bits.

    Each of the first 12 bits multiplies the ratio by a power. Products are rounded in the same way on every device;
    `exp` is not.
    """
    aspects = torch.full_like(draws, _MIN_ASPECT, dtype=torch.float64)
    for bit in range(12):
        power = (_MAX_ASPECT / _MIN_ASPECT) ** (2.0 ** -(bit + 1))
        aspects = torch.where((draws >> (30 - bit) & 1).bool(), aspects * power, aspects)
    return aspects


def _mix_bits(values: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """SplitMix64's finaliser: a bijection of 64-bit words in which every input bit affects every output bit."""
    values = (values ^ _shift_right(values, 30)) * _FACTOR_1
    values = (values ^ _shift_right(values, 27)) * _FACTOR_2
    return values ^ _shift_right(values, 31)


def _shift_right(values: Int64[Tensor, "*shape"], bits: int) -> Int64[Tensor, "*shape"]:
    """Logical right shift: torch has no uint64 shifts, and `>>` on int64 fills with the sign bit."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
