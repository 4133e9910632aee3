"""Randomness without a generator: uniform numbers as a pure function of (seed, epoch, sample).

Every random number of the data path is a counter-based hash (the finaliser of SplitMix64, Steele et al., OOPSLA 2014)
of a 64-bit key. Nothing carries state from step to step: any batch of any epoch is computed without the ones before it.
`model/masking.py` runs the same finaliser on the device over the same keys.
"""

import numpy as np
from jaxtyping import Float64, Int64, UInt64

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_1, _FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)


def mix_bits(values: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """SplitMix64's finaliser: a bijection of 64-bit words in which every input bit affects every output bit."""
    values = (values ^ (values >> _SHIFT_1)) * _FACTOR_1
    values = (values ^ (values >> _SHIFT_2)) * _FACTOR_2
    return values ^ (values >> _SHIFT_3)


def seed_word(seed: int, *path: str) -> UInt64[np.ndarray, "1"]:
    """One 64-bit word for `seed` and a purpose, so that the order and the crops of one seed are unrelated."""
    word = mix_bits(np.array([seed % 2**64], np.uint64) + _GAMMA)
    for name in path:
        word = mix_bits(word ^ np.frombuffer(name.encode().ljust(8, b"\0")[:8], np.uint64) + _GAMMA)
    return word


def sample_keys(
    word: UInt64[np.ndarray, "1"], epochs: Int64[np.ndarray, "b"], samples: Int64[np.ndarray, "b"]
) -> UInt64[np.ndarray, "b"]:
    """A key for each (epoch, sample). Samples of one epoch never share a key, because `mix_bits` is a bijection."""
    return mix_bits(mix_bits(word + epochs.astype(np.uint64) * _GAMMA) + samples.astype(np.uint64) * _GAMMA)  # (B,)


def uniforms(keys: UInt64[np.ndarray, "b"], count: int) -> Float64[np.ndarray, "b count"]:
    """`count` numbers in [0, 1) for each key, 53 bits each."""
    counters = np.arange(1, count + 1, dtype=np.uint64) * _GAMMA
    return (mix_bits(keys[:, None] + counters) >> np.uint64(11)) * 2.0**-53  # (B, count)
