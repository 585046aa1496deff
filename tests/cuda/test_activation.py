"""activate: an MLP's activation, gated or not, where its first products are done by others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.compare import assert_rounded_alike
from tests.cuda.reference.activation import activate
from tests.cuda.structures import TYPES, Activation
from tests.cuda_on_cpu.device import Device


def numbers(dtype: torch.dtype, rows: int, size: int) -> Tensor:
    """Small and large ones, so that exponentials overflow too."""
    generator = torch.Generator().manual_seed(size)
    x = 3 * torch.randn(rows, size, generator=generator)
    x[0, : min(size, 5)] = torch.tensor([-200.0, 200.0, 0.0, -20.0, 88.0])[:size]
    return x.to(dtype)


def run(device: Device, activation: Activation, gated: bool, x: Tensor, *, x_row: int = 0, offset: int = 0) -> Tensor:
    """`x_row`: elements from one row to the next, if not those of x."""
    rows, width = x.shape
    size = width // 2 if gated else width
    padded = torch.full((rows, x_row or width), torch.nan, dtype=x.dtype)
    padded[:, :width] = x
    inner = device.empty(rows, size, dtype=x.dtype, offset=offset)
    device.load("activation.cu").activate(
        *(TYPES[x.dtype], activation, gated, device.tensor(padded, offset), padded.shape[1], inner, rows, size, None)
    )
    return inner


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("gated", [False, True])
def test_activations(device: Device, dtype: torch.dtype, activation: Activation, gated: bool) -> None:
    for size in (1, 40, 520):
        x = numbers(dtype, 3, 2 * size if gated else size)
        assert_rounded_alike(run(device, activation, gated, x), activate(activation, gated, x))


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_that_are_not_aligned(device: Device, dtype: torch.dtype) -> None:
    for size, x_row, offset in ((7, 0, 0), (9, 23, 0), (40, 96, 0), (40, 81, 0), (40, 0, 4)):
        x = numbers(dtype, 3, 2 * size)
        got = run(device, Activation.SILU, True, x, x_row=x_row, offset=offset)
        assert torch.equal(got, run(device, Activation.SILU, True, x))
        assert_rounded_alike(got, activate(Activation.SILU, True, x))


@pytest.mark.parametrize("activation", Activation)
def test_nan_stays(device: Device, activation: Activation) -> None:
    x = torch.tensor([[torch.nan, 1.0]])
    assert run(device, activation, False, x)[0].isnan().tolist() == [True, False]
