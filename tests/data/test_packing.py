"""Packing keeps every token, fills well, and keeps examples apart in a real model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fast.data import PackedSequence, SFTExample, pack, pad_right

MAX_LENGTH = 16

examples = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=MAX_LENGTH).map(
        lambda tokens: SFTExample([t for t, _ in tokens], [False, *(m for _, m in tokens[1:])])
    ),
    max_size=30,
)


def split(packed: PackedSequence) -> list[SFTExample]:
    starts = [i for i, position in enumerate(packed.position_ids) if position == 0]
    ends = [*starts[1:], len(packed.input_ids)]
    for a, b in zip(starts, ends, strict=True):
        assert packed.position_ids[a:b] == list(range(b - a))
    return [SFTExample(packed.input_ids[a:b], packed.loss_mask[a:b]) for a, b in zip(starts, ends, strict=True)]


def counted(group: list[SFTExample]) -> Counter[tuple[tuple[int, ...], tuple[bool, ...]]]:
    return Counter((tuple(e.input_ids), tuple(e.loss_mask)) for e in group)


@given(examples)
def test_no_token_is_lost_or_used_twice(group: list[SFTExample]) -> None:
    packed = pack(group, MAX_LENGTH)
    assert counted([e for p in packed for e in split(p)]) == counted(group)
    assert all(0 < len(p.input_ids) <= MAX_LENGTH for p in packed)
    assert pack(group, MAX_LENGTH) == packed


@given(examples)
def test_it_is_first_fit_decreasing(group: list[SFTExample]) -> None:
    bins: list[int] = []
    for length in sorted((len(e.input_ids) for e in group), reverse=True):
        place = next((i for i, used in enumerate(bins) if used + length <= MAX_LENGTH), None)
        if place is None:
            bins.append(length)
        else:
            bins[place] += length
    assert [len(p.input_ids) for p in pack(group, MAX_LENGTH)] == bins


def test_first_token_of_an_example_is_never_trained() -> None:
    (packed,) = pack([SFTExample([1, 2, 3], [True] * 3), SFTExample([4, 5], [True] * 2)], 8)
    assert packed.loss_mask == [False, True, True, False, True]


def test_example_too_long() -> None:
    with pytest.raises(ValueError, match="an example has 3 tokens, more than max_length 2"):
        pack([SFTExample([1, 2, 3], [False, True, True])], 2)


def test_packed_logits_are_those_of_each_example_alone(tiny_llama: Path) -> None:
    """With padding beside it, and single tokens, whose position does not tell them from their neighbour's first."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 7, 5, 3, 1, 1, 8, 2]
    ids = [torch.randint(5, 200, (n,), generator=generator).tolist() for n in lengths]
    packed = pack([SFTExample(row, [False] * len(row)) for row in ids], MAX_LENGTH)
    assert max(Counter(p.position_ids)[0] for p in packed) >= 3
    assert len({len(p.input_ids) for p in packed}) > 1
    batch = pad_right([p.input_ids for p in packed], 0)
    positions = pad_right([p.position_ids for p in packed], 0)
    with torch.no_grad():
        logits = model(batch, position_ids=positions, use_cache=False).logits
        seen = 0
        for row, sequence in zip(logits, packed, strict=True):
            at = 0
            for example in split(sequence):
                alone = model(torch.tensor([example.input_ids]), use_cache=False).logits[0]
                length = len(example.input_ids)
                torch.testing.assert_close(row[at : at + length], alone, rtol=0, atol=2e-5)
                at += length
                seen += length
        # The check can fail: without the positions, examples see each other.
        mixed = model(batch, use_cache=False).logits
    assert seen == sum(lengths)
    assert (mixed - logits)[0, 12:].abs().max() > 0.1
    assert logits.isfinite().all()
