"""Micro-batches hold every row once, within the budget; padding holds every token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.data import pad_right, token_budget_batches


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), max_size=40), st.integers(1, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = token_budget_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(lengths, reverse=True)


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(1, 40))
def test_no_grouping_of_the_sorted_rows_has_fewer_batches(lengths: list[int], budget: int) -> None:
    ordered = sorted(lengths, reverse=True)
    fewest = [0] * (len(ordered) + 1)  # fewest[i]: batches for the rows from i on
    for i in reversed(range(len(ordered))):
        ends = [j for j in range(i + 1, len(ordered) + 1) if j == i + 1 or (j - i) * ordered[i] <= budget]
        fewest[i] = 1 + min(fewest[j] for j in ends)
    assert len(token_budget_batches(lengths, budget)) == fewest[0]


def test_equal_lengths_keep_their_order() -> None:
    assert token_budget_batches([3, 5, 3, 5, 3], 10) == [[1, 3], [0, 2, 4]]


def test_row_longer_than_the_budget_is_alone() -> None:
    assert token_budget_batches([2, 99, 2], 4) == [[1], [0, 2]]


def test_no_rows_and_no_budget() -> None:
    assert token_budget_batches([], 10) == []
    with pytest.raises(ValueError, match="at least 1 token"):
        token_budget_batches([1], 0)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**40), max_size=8), max_size=8), st.integers(-1, 5))
def test_padding_is_on_the_right(rows: list[list[int]], pad_id: int) -> None:
    padded = pad_right(rows, pad_id)
    assert padded.dtype == torch.int64
    assert padded.shape == (len(rows), max(map(len, rows), default=0))
    for row, got in zip(rows, padded.tolist(), strict=True):
        assert got == row + [pad_id] * (padded.shape[1] - len(row))


def test_padding_takes_masks() -> None:
    assert pad_right([[True], [False, True]], 0).tolist() == [[1, 0], [0, 1]]
