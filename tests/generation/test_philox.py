"""The random numbers: the published test vectors, and a number's place decides it."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_fast.generation.philox import philox4x32, uniforms

# Known answers of the authors' library Random123 (kat_vectors, philox4x32 10): counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_published_vectors(counter: tuple[int, ...], key: tuple[int, ...], output: tuple[int, ...]) -> None:
    words = [np.array([word], dtype=np.uint64) for word in (*counter, *key)]
    got = philox4x32((words[0], words[1], words[2], words[3]), (words[4], words[5]))
    assert tuple(int(word[0]) for word in got) == output


def test_a_number_depends_on_seed_sample_and_position_alone() -> None:
    block = uniforms([5, 5, 6, -1], [0, 1, 0, 0], 0, 64)
    assert len(np.unique(block)) == block.size
    assert np.array_equal(uniforms([6], [0], 17, 3), block[2:3, 17:20])
    assert np.array_equal(uniforms([2**64 - 1], [0], 0, 64), block[3:])  # seeds are taken modulo 2^64


def test_numbers_are_uniform() -> None:
    numbers = uniforms(range(1000), [0] * 1000, 0, 100).ravel()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert abs(chi_square - 99) < 4 * np.sqrt(2 * 99)
