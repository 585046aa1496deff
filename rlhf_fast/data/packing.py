"""Several examples in one sequence, each attending to itself alone, so that no compute is spent on padding.

What keeps them apart is `position_ids`, which restart at 0 with each example: transformers (masking_utils,
find_packed_sequence_indices) then makes the causal mask block-diagonal, on two conditions. There must be no attention
mask and no cache: `model(input_ids, position_ids=..., use_cache=False)`; with a cache, the default of most models, it
silently attends across examples. And the model must pass position_ids on to its mask, which not all do (OPT does not):
`rlhf_fast.models.supports_packing` tries it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_fast.data.examples import SFTExample


@dataclass(frozen=True)
class PackedSequence:
    """input_ids, loss_mask and position_ids, [L] each; positions restart at 0 with each example.

    The mask is False on each example's first token: the state before it belongs to another example.
    Pad a batch of them on the right with position 0: padding then attends to nothing but itself.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    position_ids: list[int]


def pack(examples: Sequence[SFTExample], max_length: int) -> list[PackedSequence]:
    """Put whole examples into sequences of at most max_length tokens; none is cut, lost or used twice.

    First-fit decreasing (Johnson 1973): at most 11/9 of the fewest sequences possible, plus one. Equal input, equal
    output. Raises ValueError for an example longer than max_length.
    """
    longest = max((len(e.input_ids) for e in examples), default=0)
    if longest > max_length:
        raise ValueError(f"an example has {longest} tokens, more than max_length {max_length}; cut it first")
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].input_ids), i))
    bins = _Bins(len(examples), max_length)
    members: list[list[SFTExample]] = []
    for i in order:
        place = bins.put(len(examples[i].input_ids))
        if place == len(members):
            members.append([])
        members[place].append(examples[i])
    return [_join(group) for group in members]


def _join(group: list[SFTExample]) -> PackedSequence:
    packed = PackedSequence([], [], [])
    for example in group:
        packed.input_ids.extend(example.input_ids)
        packed.loss_mask.extend([False, *example.loss_mask[1:]])
        packed.position_ids.extend(range(len(example.input_ids)))
    return packed


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
