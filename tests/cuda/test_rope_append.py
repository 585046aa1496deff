"""rope_append: queries and keys normed and rotated in place, keys and values to their pages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda import structures
from tests.cuda.compare import assert_rounded_alike
from tests.cuda.paged import Layout, Pool, Tokens
from tests.cuda.reference.norm import Norm
from tests.cuda.reference.rope_append import Rotary, prepare
from tests.cuda.structures import TYPES
from tests.cuda.test_norm import make_norm, on_device
from tests.cuda_on_cpu.device import Device

LENGTHS = [40, 17, 1]
# Two tokens of one sequence on both sides of a page's end, one that is padding, first positions and last ones.
PLACES = [(0, 15), (0, 16), (1, 3), (-7, -1), (1, 16), (2, 0), (0, 39)]


def make_rotary(size: int, interleaved: bool = False) -> Rotary:
    angle = torch.arange(40)[:, None] * 100.0 ** (-torch.arange(size // 2) / max(size // 2, 1))
    return Rotary(angle.cos(), angle.sin(), interleaved)


def rotary_on_device(device: Device, rotary: Rotary | None) -> structures.Rotary:
    if rotary is None:
        return structures.Rotary()
    cos, sin = device.tensor(rotary.cos), device.tensor(rotary.sin)
    return structures.Rotary(cos.data_ptr(), sin.data_ptr(), 2 * rotary.cos.shape[1], rotary.interleaved)


def projections(dtype: torch.dtype, tokens: int, row: int) -> Tensor:
    return torch.randn(tokens, row, generator=torch.Generator().manual_seed(row)).to(dtype)


def run(
    device: Device,
    dtype: torch.dtype,
    layout: Layout,
    rotary: Rotary | None,
    *,
    norms: tuple[Norm, Norm] = (Norm(), Norm()),
    query_scale: float = 1.0,
    offset: int = 0,
    places: list[tuple[int, int]] = PLACES,
    rows: Tensor | None = None,
) -> tuple[Tensor, Pool]:
    """Runs layer 1 and compares everything with the reference. Returns the projections and the cache."""
    pool = Pool(device, dtype, layout, LENGTHS, offset=offset)
    tokens = Tokens(device, pool, places)
    rows = projections(dtype, len(places), layout.row) if rows is None else rows
    got = device.tensor(rows, offset)
    device.load("rope_append.cu").rope_append(
        pool.structure,
        1,
        layout.structure(),
        *(on_device(device, norm) for norm in norms),
        rotary_on_device(device, rotary),
        query_scale,
        tokens.structure,
        got,
        layout.row,
        None,
    )
    real = tokens.position >= 0
    queries, keys, values = layout.split(rows[real])
    position = tokens.position[real].long()
    got_queries, got_keys, got_values = layout.split(got[real])
    assert_rounded_alike(got_queries, prepare(queries, position, norms[0], rotary, query_scale))
    assert_rounded_alike(got_keys, prepare(keys, position, norms[1], rotary, 1))
    assert torch.equal(got_values, values)
    assert got.isfinite().all()
    # Each where it belongs in layer 1, and nothing anywhere else.
    for (sequence, place), key, value in zip([p for p in places if p[1] >= 0], got_keys, got_values, strict=True):
        cached_keys, cached_values = pool.written(1, sequence, place + 1)
        assert torch.equal(cached_keys[place], key)
        assert torch.equal(cached_values[place], value)
    written = 2 * layout.key_value_heads * layout.size * int(real.sum())
    assert int(pool.memory.isfinite().sum()) == written
    return got, pool


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [8, 64, 80, 96, 128, 256])
def test_head_sizes(device: Device, dtype: torch.dtype, size: int) -> None:
    run(device, dtype, Layout(4, 2, size), make_rotary(size))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["rms", "llama", "layer"])
def test_heads_that_are_normed(device: Device, dtype: torch.dtype, kind: str) -> None:
    norms = make_norm(kind, 24, seed=1), make_norm(kind, 24, seed=2)
    run(device, dtype, Layout(3, 1, 24), make_rotary(24), norms=norms)


@pytest.mark.parametrize("dtype", TYPES)
def test_no_rotation(device: Device, dtype: torch.dtype) -> None:
    """GPT-2's heads only move to the cache, Qwen3's without a rotation are normed."""
    layout = Layout(2, 2, 40)
    run(device, dtype, layout, None)
    run(device, dtype, layout, None, norms=(make_norm("rms", 40), Norm()), query_scale=0.3)


@pytest.mark.parametrize("dtype", TYPES)
def test_partial_interleaved_and_scaled(device: Device, dtype: torch.dtype) -> None:
    run(device, dtype, Layout(2, 1, 32), make_rotary(8))
    run(device, dtype, Layout(2, 1, 32), make_rotary(32, interleaved=True))
    run(device, dtype, Layout(2, 1, 32), make_rotary(8, interleaved=True), query_scale=0.3)
    run(device, dtype, Layout(2, 1, 32), make_rotary(32), query_scale=0.3)


@pytest.mark.parametrize("dtype", TYPES)
def test_heads_side_by_side(device: Device, dtype: torch.dtype) -> None:
    run(device, dtype, Layout(3, 3, 16, together=True), make_rotary(16))


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_not_aligned(device: Device, dtype: torch.dtype) -> None:
    run(device, dtype, Layout(3, 1, 14), make_rotary(14), norms=(make_norm("layer", 14), make_norm("rms", 14)))
    run(device, dtype, Layout(3, 1, 7), make_rotary(4))
    run(device, dtype, Layout(3, 1, 16), make_rotary(16), offset=4)


@pytest.mark.parametrize("dtype", TYPES)
def test_bits_are_of_the_token_alone(device: Device, dtype: torch.dtype) -> None:
    layout, rotary, norms = Layout(4, 2, 48), make_rotary(48), (make_norm("rms", 48), make_norm("layer", 48))
    rows = projections(dtype, len(PLACES), layout.row)
    together, _ = run(device, dtype, layout, rotary, norms=norms, rows=rows)
    alone, _ = run(device, dtype, layout, rotary, norms=norms, rows=rows[4:5], places=PLACES[4:5])
    assert torch.equal(together[4:5], alone)
    rows[4, 5] += 1
    changed, _ = run(device, dtype, layout, rotary, norms=norms, rows=rows)
    assert not torch.equal(changed[4], alone[0])
