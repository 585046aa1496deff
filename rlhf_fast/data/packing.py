"""Rows put together so that they fill up a number of tokens: examples into packs, rows into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_fast.data.examples import SFTExample

Pack = list[SFTExample]  # examples that count as one row of a batch


def pack(examples: Sequence[SFTExample], max_length: int) -> list[Pack]:
    """Put whole examples into packs of at most max_length tokens; none is cut, lost or used twice.

    Raises ValueError for an example longer than max_length.
    """
    lengths = [len(example.input_ids) for example in examples]
    longest = max(lengths, default=0)
    if longest > max_length:
        raise ValueError(f"an example has {longest} tokens, more than max_length {max_length}; cut it first")
    return [[examples[i] for i in group] for group in first_fit_decreasing(lengths, max_length)]


def first_fit_decreasing(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of rows, in groups of at most `size` tokens; a longer row is alone.

    Johnson 1973: at most 11/9 of the fewest groups possible, plus one. Longest first; equal input, equal output.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins = _Bins(len(lengths), size)
    groups: list[list[int]] = []
    for i in order:
        place = bins.put(min(lengths[i], size))
        if place == len(groups):
            groups.append([])
        groups[place].append(i)
    return groups


class _Bins:
    """The first of `count` bins of equal size with room enough, in log(count) steps: a tree of the largest rooms."""

    def __init__(self, count: int, size: int) -> None:
        self.leaves = 1 << max(0, count - 1).bit_length()
        self.room = [size] * (2 * self.leaves)  # node k has the children 2k and 2k + 1; leaves come last

    def put(self, length: int) -> int:
        node = 1
        while node < self.leaves:
            node *= 2
            if self.room[node] < length:
                node += 1
        place = node - self.leaves
        self.room[node] -= length
        while node > 1:
            node //= 2
            self.room[node] = max(self.room[2 * node], self.room[2 * node + 1])
        return place
