"""Packing keeps every token and fills well."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.data import SFTExample, first_fit_decreasing, pack

MAX_LENGTH = 16

examples = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=MAX_LENGTH).map(
        lambda tokens: SFTExample([t for t, _ in tokens], [False, *(m for _, m in tokens[1:])])
    ),
    max_size=30,
)


def size(members: list[SFTExample]) -> int:
    return sum(len(example.input_ids) for example in members)


def counted(group: list[SFTExample]) -> Counter[tuple[tuple[int, ...], tuple[bool, ...]]]:
    return Counter((tuple(e.input_ids), tuple(e.loss_mask)) for e in group)


@settings(deadline=None)
@given(examples)
def test_no_token_is_lost_or_used_twice(group: list[SFTExample]) -> None:
    packed = pack(group, MAX_LENGTH)
    assert counted([example for members in packed for example in members]) == counted(group)
    assert all(0 < tokens <= MAX_LENGTH for tokens in map(size, packed))
    assert pack(group, MAX_LENGTH) == packed


@settings(deadline=None)
@given(examples)
def test_it_is_first_fit_decreasing(group: list[SFTExample]) -> None:
    bins: list[int] = []
    for length in sorted((len(e.input_ids) for e in group), reverse=True):
        place = next((i for i, used in enumerate(bins) if used + length <= MAX_LENGTH), None)
        if place is None:
            bins.append(length)
        else:
            bins[place] += length
    assert [size(members) for members in pack(group, MAX_LENGTH)] == bins


def test_example_too_long() -> None:
    with pytest.raises(ValueError, match="an example has 3 tokens, more than max_length 2"):
        pack([SFTExample([1, 2, 3], [False, True, True])], 2)


def test_a_row_longer_than_the_size_is_alone() -> None:
    assert first_fit_decreasing([3, 99, 1, 2], 4) == [[1], [0, 2], [3]]
    assert first_fit_decreasing([], 4) == []
