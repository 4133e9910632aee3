"""Random masking: which patches of an image stay visible (paper, section 3, "Masking").

Every patch gets a score that is a hash of (key, patch number); the patches of the lowest scores stay. The key of an
image is made on the host from (seed, epoch, sample), so a mask is a pure function of those three: no generator, no
state, no copy to the device, and the CPU and the GPU draw the same bits. The hash is the finaliser of SplitMix64
(Steele et al., OOPSLA 2014) in int64 arithmetic, which wraps as uint64 does.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

# Unsigned constants of SplitMix64, written as the int64 of the same bits.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_FACTOR_1, _FACTOR_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
# Keeps masks apart from anything else that may be drawn from the same key; ASCII of "patches\0".
_STREAM = 0x7061746368657300
_NUMBER_BITS = 16


class Mask(NamedTuple):
    """Patch numbers of a batch, split by visibility; every image keeps equally many."""

    kept: Int64[Tensor, "b k"]
    removed: Int64[Tensor, "b r"]
    restore: Int64[Tensor, "b l"]
    """Where each patch stands in `cat([kept, removed])`: indexing that with `restore` gives the patches in order."""


def keep_count(num_patches: int, mask_ratio: float) -> int:
    """Patches that stay visible. Cut off in floating point as the reference does: 100 patches at 0.9 keep 9."""
    return int(num_patches * (1 - mask_ratio))


def random_mask(keys: Int64[Tensor, "b"], num_patches: int, keep: int) -> Mask:
    """A uniformly random mask for each key; equal keys give equal masks, on any device.

    Raises:
        ValueError: more than 65,536 patches, which the scores cannot tell apart.
    """
    if num_patches > 2**_NUMBER_BITS:
        raise ValueError(f"{num_patches} patches; a mask covers at most {2**_NUMBER_BITS}")
    return mask_by_score(_hash_scores(keys, num_patches), keep)


def mask_by_score(scores: Shaped[Tensor, "b l"], keep: int) -> Mask:
    """Keep the `keep` patches of lowest score in each row; scores within a row are distinct."""
    order = scores.argsort(dim=1)  # (B, L)
    # The inverse permutation, which a second argsort also gives: place `order[i]` holds i.
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    restore = torch.empty_like(order).scatter_(1, order, places)  # (B, L)
    return Mask(order[:, :keep], order[:, keep:], restore)


def take(tokens: Float[Tensor, "b l d"], numbers: Int64[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
    """The tokens of each image at `numbers`, in that order."""
    return tokens.gather(1, numbers[:, :, None].expand(-1, -1, tokens.shape[2]))  # (B, N, D)


# An operator of its own, so that torch.compile calls it and does not translate it: Inductor's arange * GAMMA overflows
# in 32 bits on CUDA (pytorch#175966, #183901), silently another mask, and corrupts the heap on a CPU (torch 2.15).
@torch.library.custom_op("maelstream::hash_scores", mutates_args=())
def _hash_scores(keys: Tensor, num_patches: int) -> Tensor:
    numbers = torch.arange(num_patches, device=keys.device)
    # The key is mixed before the numbers are added: the masks of consecutive keys must not be shifts of each other.
    hashes = _mix(_mix(keys ^ _STREAM)[:, None] + (numbers + 1) * _GAMMA)  # (B, L)
    # 47 random bits above the patch number: no score is negative (signed order is unsigned order) and no two are equal,
    # so every sort algorithm gives the same mask.
    return _shift_right(hashes, 17) << _NUMBER_BITS | numbers  # (B, L)


@_hash_scores.register_fake
def _(keys: Tensor, num_patches: int) -> Tensor:
    return keys.new_empty(len(keys), num_patches)


def _mix(values: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """SplitMix64's finaliser: a bijection of 64-bit words in which every input bit moves every output bit."""
    values = (values ^ _shift_right(values, 30)) * _FACTOR_1
    values = (values ^ _shift_right(values, 27)) * _FACTOR_2
    return values ^ _shift_right(values, 31)


def _shift_right(values: Int64[Tensor, "*shape"], bits: int) -> Int64[Tensor, "*shape"]:
    """Logical shift: torch has no uint64 shifts, and `>>` on int64 copies the sign bit in from the left."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
