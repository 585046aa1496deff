"""Counter-based random numbers: Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as
1, 2, 3"). A number is a function of its place, not of the numbers drawn before it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]  # 32-bit words, in 64 bits so that products fit

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, ...]:
    """Ten rounds on four counter words under two key words; arrays of one shape, or that broadcast to one."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (p1 >> _32) ^ x1 ^ k0, p1 & _LOW, (p0 >> _32) ^ x3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return x0, x1, x2, x3


def uniforms(seeds: Sequence[int], samples: Sequence[int], start: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers [B, count] in [0, 1), 53 random bits each, for positions start, start + 1, ...

    Row b depends on (seeds[b], samples[b], position) alone: key = the seed's two words (modulo 2^64), counter =
    (position, sample, 0, 0), number = the first two output words.
    """
    seed = np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], dtype=np.uint64)[:, None]
    sample = np.array(samples, dtype=np.uint64)[:, None]
    position = np.arange(start, start + count, dtype=np.uint64)[None, :]
    zero = np.zeros((1, 1), dtype=np.uint64)
    high, low, _, _ = philox4x32((position, sample, zero, zero), (seed & _LOW, seed >> _32))
    bits = ((high << _32) | low) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
