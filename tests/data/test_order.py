"""EpochOrder: every row once an epoch, for any batch size and number of ranks, and resumable anywhere."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.data import EpochOrder
from rlhf_fast.errors import DataError


def take(order: EpochOrder, batches: int) -> list[int]:
    return [i for _ in range(batches) for i in order.next()]


sizes = st.integers(1, 40)
batch_sizes = st.integers(1, 50)
seeds = st.integers(-(2**31), 2**63)


@settings(deadline=None)
@given(sizes, batch_sizes, seeds)
def test_three_epochs_hold_every_row_three_times(size: int, batch_size: int, seed: int) -> None:
    order = EpochOrder(size, batch_size, seed=seed)
    rows = take(order, -(-3 * size // batch_size))
    epochs = [rows[e * size : (e + 1) * size] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(size))] * 3
    assert order.epoch == len(rows) / size


@settings(deadline=None)
@given(sizes, batch_sizes, seeds, st.integers(0, 12), st.integers(1, 8))
def test_resumed_anywhere_it_goes_on_the_same(size: int, batch_size: int, seed: int, at: int, more: int) -> None:
    order = EpochOrder(size, batch_size, seed=seed)
    take(order, at)
    state = order.state_dict()
    expected = take(order, more)
    resumed = EpochOrder(size, batch_size, seed=0)
    take(resumed, 1)  # what it did before does not matter
    resumed.load_state_dict(state)
    assert take(resumed, more) == expected
    assert resumed.state_dict() == order.state_dict()


@settings(deadline=None)
@given(sizes, st.integers(1, 6), st.integers(1, 6), seeds)
def test_ranks_share_a_batch_without_overlap(size: int, share: int, world_size: int, seed: int) -> None:
    whole = EpochOrder(size, share * world_size, seed=seed)
    ranks = [EpochOrder(size, share * world_size, seed=seed, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(4):
        parts = [rank.next() for rank in ranks]
        assert [len(part) for part in parts] == [share] * world_size
        batch = whole.next()
        assert sorted(i for part in parts for i in part) == sorted(batch)
        assert [list(row) for row in zip(*parts, strict=True)] == [
            batch[i : i + world_size] for i in range(0, len(batch), world_size)
        ]
    assert all(rank.state_dict() == whole.state_dict() for rank in ranks)


def test_resumed_on_another_number_of_ranks_and_batch_size() -> None:
    alone = EpochOrder(10, 4, seed=1)
    take(alone, 2)
    expected = take(alone, 3)
    first = EpochOrder(10, 4, seed=1, rank=1, world_size=2)
    take(first, 2)
    ranks = [EpochOrder(10, 6, seed=1, rank=r, world_size=3) for r in range(3)]
    for rank in ranks:
        rank.load_state_dict(first.state_dict())
    parts = [take(rank, 2) for rank in ranks]
    assert [i for row in zip(*parts, strict=True) for i in row] == expected


def test_epochs_and_seeds_differ() -> None:
    first, second = EpochOrder(100, 100, seed=0), EpochOrder(100, 100, seed=1)
    batches = [first.next(), first.next(), second.next()]
    assert len({tuple(batch) for batch in batches}) == 3
    assert list(range(100)) not in batches


def test_the_order_is_the_same_everywhere() -> None:
    """Written down: a checkpoint of today must go on the same under any later version of numpy."""
    assert EpochOrder(8, 16, seed=7).next() == [4, 1, 6, 3, 2, 7, 5, 0, 3, 1, 6, 2, 5, 4, 0, 7]


def test_data_of_another_size_is_refused() -> None:
    state = EpochOrder(10, 2, seed=0).state_dict()
    with pytest.raises(DataError, match=r"had 10 usable rows when the checkpoint was written and has 11 now"):
        EpochOrder(11, 2, seed=0).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"size": 0, "batch_size": 1}, "must be at least 1"),
        ({"size": 1, "batch_size": 0}, "must be at least 1"),
        ({"size": 9, "batch_size": 3, "world_size": 2}, "must be a multiple of the number of ranks"),
        ({"size": 9, "batch_size": 2, "world_size": 2, "rank": 2}, "rank must be from 0 to 1"),
    ],
)
def test_numbers_that_do_not_fit(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        EpochOrder(**arguments, seed=0)
