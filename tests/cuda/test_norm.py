"""add_norm: the residual takes a branch's output, then it is normed for the next branch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda import structures
from tests.cuda.compare import assert_rounded_alike
from tests.cuda.reference.norm import Norm, add_norm
from tests.cuda.structures import TYPES, NormKind, pointer
from tests.cuda_on_cpu.device import Device

KINDS = ["none", "rms", "llama", "layer", "plain layer"]


def make_norm(kind: str, size: int, seed: int = 0) -> Norm:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(size, generator=generator) for _ in range(2))
    return {
        "none": Norm(),
        "rms": Norm(NormKind.RMS, weight),
        "llama": Norm(NormKind.RMS, weight, round_before_weight=True),
        "layer": Norm(NormKind.LAYER, weight, bias),
        "plain layer": Norm(NormKind.LAYER, epsilon=1e-3),
    }[kind]


def on_device(device: Device, norm: Norm, offset: int = 0) -> structures.Norm:
    parts = [None if part is None else device.tensor(part, offset) for part in (norm.weight, norm.bias)]
    return structures.Norm(norm.kind, *map(pointer, parts), norm.epsilon, norm.round_before_weight)


def rows(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.5 + 2 * torch.randn(*shape, generator=generator)).to(dtype)


def run(
    device: Device,
    x: Tensor | None,
    residual: Tensor,
    *,
    out_norm: Norm | None = None,
    norm: Norm | None = None,
    offset: int = 0,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(residual, y) as the kernel leaves them; no norm: no y. `offset`: of everything from 16-byte alignment."""
    x = None if x is None else device.tensor(x, offset)
    residual = device.tensor(residual, offset)
    y = None
    if norm is not None:
        y = x if in_place else device.empty(*residual.shape, dtype=residual.dtype, offset=offset)
    norms = [on_device(device, part or Norm(), offset) for part in (out_norm, norm)]
    count, size = residual.shape
    device.load("norm.cu").add_norm(TYPES[residual.dtype], norms[0], x, 0.3, residual, norms[1], y, count, size, None)
    return residual, y


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7, 256, 264])
def test_the_residual_and_its_norm(device: Device, dtype: torch.dtype, kind: str, size: int) -> None:
    x, residual, norm = rows(dtype, 3, size), rows(dtype, 3, size, seed=1), make_norm(kind, size)
    got = run(device, x, residual, norm=norm)
    expected = add_norm(Norm(), x, 0.3, residual, norm)
    assert torch.equal(got[0], expected[0])
    assert_rounded_alike(got[1], expected[1])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_branch_that_is_normed_first(device: Device, dtype: torch.dtype, kind: str) -> None:
    x, residual = rows(dtype, 3, 136), rows(dtype, 3, 136, seed=1)
    out_norm, norm = make_norm(kind, 136), make_norm("rms", 136, seed=1)
    got = run(device, x, residual, out_norm=out_norm, norm=norm)
    expected = add_norm(out_norm, x, 0.3, residual, norm)
    assert_rounded_alike(got[0], expected[0])
    # of the kernel's own residual: a norm magnifies where that rounded otherwise
    assert_rounded_alike(got[1], norm(got[0]))


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_longer_than_the_block(device: Device, dtype: torch.dtype) -> None:
    x, residual = rows(dtype, 2, 4136), rows(dtype, 2, 4136, seed=1)
    out_norm, norm = make_norm("layer", 4136), make_norm("llama", 4136, seed=1)
    got = run(device, x, residual, out_norm=out_norm, norm=norm)
    assert_rounded_alike(got[0], add_norm(out_norm, x, 0.3, residual, norm)[0])
    assert_rounded_alike(got[1], norm(got[0]))


@pytest.mark.parametrize("dtype", TYPES)
def test_parts_that_are_left_out(device: Device, dtype: torch.dtype) -> None:
    x, residual, norm = rows(dtype, 2, 72), rows(dtype, 2, 72, seed=1), make_norm("rms", 72)
    got, y = run(device, None, residual, norm=norm)
    assert torch.equal(got, residual)
    assert_rounded_alike(y, norm(residual))
    got, y = run(device, x, residual)
    assert torch.equal(got, add_norm(Norm(), x, 0.3, residual, norm)[0])


@pytest.mark.parametrize("dtype", TYPES)
def test_y_may_be_x(device: Device, dtype: torch.dtype) -> None:
    x, residual, norm = rows(dtype, 2, 72), rows(dtype, 2, 72, seed=1), make_norm("layer", 72)
    for out_norm in (Norm(), make_norm("rms", 72)):
        apart = run(device, x, residual, out_norm=out_norm, norm=norm)
        together = run(device, x, residual, out_norm=out_norm, norm=norm, in_place=True)
        assert torch.equal(apart[0], together[0])
        assert torch.equal(apart[1], together[1])


@pytest.mark.parametrize("dtype", TYPES)
def test_bits_are_of_the_row_alone(device: Device, dtype: torch.dtype) -> None:
    """Neither other rows nor where the rows begin change a bit; one number of its own does."""
    x, residual, norm = rows(dtype, 5, 1032), rows(dtype, 5, 1032, seed=1), make_norm("layer", 1032)
    together = run(device, x, residual, norm=norm)[1]
    alone = run(device, x[3:4], residual[3:4], norm=norm)[1]
    unaligned = run(device, x, residual, norm=norm, offset=4)[1]
    assert torch.equal(together[3:4], alone)
    assert torch.equal(together, unaligned)
    residual[3, 7] += 1
    assert not torch.equal(run(device, x, residual, norm=norm)[1][3], alone[0])
