"""attention: each token's queries against its sequence's pages."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.cuda.paged import Layout, Pool, Tokens
from tests.cuda.reference.attention import attention
from tests.cuda.structures import TYPES
from tests.cuda_on_cpu.device import Device

# Around the ends of pages (16 positions) and of what a block takes at once (128).
LENGTHS = [1, 5, 16, 17, 127, 128, 129, 300]


class Case:
    """Sequences in a cache and a pass that asks each for its last token, with padding between."""

    def __init__(
        self,
        device: Device,
        dtype: torch.dtype,
        layout: Layout,
        lengths: Sequence[int] = LENGTHS,
        *,
        offset: int = 0,
        places: Sequence[tuple[int, int]] | None = None,
        largest: float = 1.0,
    ) -> None:
        self.device, self.dtype, self.layout, self.lengths = device, dtype, layout, lengths
        generator = torch.Generator().manual_seed(layout.size)
        self.pool = Pool(device, dtype, layout, lengths, layers=2, offset=offset)
        for sequence, length in enumerate(lengths):
            shape = 2, length, layout.key_value_heads, layout.size
            self.pool.write(1, sequence, *torch.randn(shape, generator=generator).to(dtype))
        self.places = list(places or [(s, n - 1) for s, n in enumerate(lengths)])
        rows = largest * torch.randn(len(self.places), layout.row, generator=generator)
        self.rows = device.tensor(rows.to(dtype), offset)
        self.offset = offset

    def run(
        self,
        *,
        scale: float = 0.2,
        cap: float = 0.0,
        window: int = 0,
        max_positions: int | None = None,
        chosen: Sequence[int] | None = None,
    ) -> Tensor:
        """[tokens, heads, size] of all tokens or of those chosen; -1 is padding."""
        chosen = range(len(self.places)) if chosen is None else chosen
        tokens = Tokens(self.device, self.pool, [self.places[i] if i >= 0 else (-7, -1) for i in chosen])
        rows = self.device.tensor(self.rows[[max(i, 0) for i in chosen]], self.offset)
        heads, layout = self.layout.structure(), self.layout
        longest = max_positions or max(self.lengths)
        kernels = self.device.load("attention.cu")
        workspace = self.device.empty(kernels.attention_workspace(heads, len(chosen), longest) // 4)
        out = self.device.empty(len(chosen), layout.query_heads, layout.size, dtype=self.dtype, offset=self.offset)
        kernels.attention(
            *(self.pool.structure, 1, heads, scale, cap, window, tokens.structure),
            *(rows, layout.row, out, workspace, longest, None),
        )
        return out

    def expected(self, *, scale: float = 0.2, cap: float = 0.0, window: int = 0) -> Tensor:
        queries, _, _ = self.layout.split(self.rows)
        outs = []
        for query, (sequence, position) in zip(queries, self.places, strict=True):
            keys, values = self.pool.written(1, sequence, position + 1)
            outs.append(attention(query, keys, values, scale, cap, window))
        return torch.stack(outs)


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Sums of float32 products in another order, then one rounding."""
    unit = torch.finfo(got.dtype).eps
    tolerance = 32 * unit if got.dtype == torch.float32 else unit
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance / 2)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [8, 64, 80, 96, 128, 256])
def test_head_sizes(device: Device, dtype: torch.dtype, size: int) -> None:
    case = Case(device, dtype, Layout(4, 2, size), [1, 20, 150])
    assert_near(case.run(), case.expected())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("query_heads", "heads"), [(1, 1), (2, 2), (4, 1), (3, 1), (14, 2), (8, 1), (11, 1)])
def test_groups(device: Device, dtype: torch.dtype, query_heads: int, heads: int) -> None:
    case = Case(device, dtype, Layout(query_heads, heads, 16), [3, 130])
    assert_near(case.run(), case.expected())


@pytest.mark.parametrize("dtype", TYPES)
def test_lengths(device: Device, dtype: torch.dtype) -> None:
    case = Case(device, dtype, Layout(4, 1, 16))
    assert_near(case.run(), case.expected())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", [1, 5, 16, 100, 128, 299, 1000])
def test_windows(device: Device, dtype: torch.dtype, window: int) -> None:
    case = Case(device, dtype, Layout(2, 1, 8), [4, 16, 133, 300])
    assert_near(case.run(window=window), case.expected(window=window))


@pytest.mark.parametrize("dtype", TYPES)
def test_caps(device: Device, dtype: torch.dtype) -> None:
    case = Case(device, dtype, Layout(2, 1, 32), [4, 140], largest=5.0)
    capped = case.run(scale=0.5, cap=3.0)
    assert_near(capped, case.expected(scale=0.5, cap=3.0))
    assert (capped - case.run(scale=0.5)).abs().max() > 0.1  # it bites


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_not_aligned(device: Device, dtype: torch.dtype) -> None:
    for layout, offset in ((Layout(4, 2, 14), 0), (Layout(2, 2, 7), 0), (Layout(4, 2, 16), 4)):
        case = Case(device, dtype, layout, [2, 135], offset=offset)
        assert_near(case.run(window=130), case.expected(window=130))


@pytest.mark.parametrize("dtype", TYPES)
def test_heads_side_by_side(device: Device, dtype: torch.dtype) -> None:
    case = Case(device, dtype, Layout(3, 3, 16, together=True), [9, 35])
    assert_near(case.run(), case.expected())


@pytest.mark.parametrize("dtype", TYPES)
def test_several_tokens_of_a_sequence(device: Device, dtype: torch.dtype) -> None:
    places = [(0, 15), (0, 16), (1, 0), (0, 139), (1, 1)]
    case = Case(device, dtype, Layout(4, 2, 16), [140, 2], places=places)
    assert_near(case.run(), case.expected())


@pytest.mark.parametrize("dtype", TYPES)
def test_a_split_of_several_tiles(device: Device, dtype: torch.dtype) -> None:
    """Beyond 64 splits of 128 positions each takes two at a time; large scores, so that the largest one moves."""
    case = Case(device, dtype, Layout(1, 1, 8), [8193 + 128], largest=8.0)
    assert_near(case.run(), case.expected())


@pytest.mark.parametrize("max_positions", [128, 1000])
def test_padding_is_left_alone(device: Device, max_positions: int) -> None:
    """With one split for all and with several."""
    case = Case(device, torch.float32, Layout(2, 1, 16), [3, 100])
    got = case.run(chosen=[-1, 0, -1, 1], max_positions=max_positions)
    assert_near(got[[1, 3]], case.expected())
    assert (got[[0, 2]] == 0).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", [0, 140])
def test_bits_are_of_the_token_alone(device: Device, dtype: torch.dtype, window: int) -> None:
    """Neither the batch nor the room for longer sequences changes a bit; a key among hundreds does."""
    case = Case(device, dtype, Layout(8, 1, 16))
    together = case.run(window=window)
    for i in (1, 4, len(LENGTHS) - 1):
        for longest in (LENGTHS[i], 300, 5000):
            alone = case.run(window=window, chosen=[i], max_positions=longest)
            assert torch.equal(alone[0], together[i])
    page = case.pool.table[len(LENGTHS) - 1, 12]
    case.pool.memory[page, 1, 0, 0, 3] += 1
    assert not torch.equal(case.run(window=window)[-1], together[-1])
