"""Counter-based random numbers: Philox4x32-10, one uniform number per sampled token.

Owns nothing and holds no state: a number is a function of (seed, choice, position), so a token can
be sampled again on another worker, in another batch or after a loss, and comes out the same.
Invariant: exact integer arithmetic only, so every machine gives the same bits.

The generator is that of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3" (2011).
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

_ROUNDS: Final = 10
_MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL: Final = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW: Final = np.uint64(0xFFFFFFFF)
_32: Final = np.uint64(32)


def philox4x32(counters: NDArray[np.uint32], keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The random words of each row. counters, result: [R, 4]; keys: [R, 2]."""
    c0, c1, c2, c3 = counters.astype(np.uint64).T  # [R] each, 32 bits in use
    k0, k1 = keys.astype(np.uint64).T
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _32) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _32) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniforms(
    seeds: Sequence[int], choices: Sequence[int], positions: Sequence[int]
) -> NDArray[np.float64]:
    """Numbers in [0, 1) with 53 random bits, [R]: one per (seed, choice, position).

    A seed is taken modulo 2^64, so negative ones are as good as any.
    """
    key = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)  # [R]
    place = np.array(positions, dtype=np.uint64)
    counters = np.stack(
        [place & _LOW, place >> _32, np.array(choices, dtype=np.uint64), np.zeros_like(place)],
        axis=1,
    )
    words = philox4x32(counters.astype(np.uint32), _split(key)).astype(np.uint64)
    bits = (words[:, 0] >> np.uint64(5)) * np.uint64(1 << 26) + (words[:, 1] >> np.uint64(6))
    result: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return result


def _split(values: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Low and high words, [R, 2]."""
    return np.stack([values & _LOW, values >> _32], axis=1).astype(np.uint32)
