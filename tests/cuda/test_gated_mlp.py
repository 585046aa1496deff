"""gated_mlp_in: activation(gate(x)) * value(x), rounded where two layers and an activation round."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda import structures
from tests.cuda.reference.gated_mlp import gated_mlp_in
from tests.cuda.reference.linear import linear
from tests.cuda.structures import TYPES, Activation, pointer
from tests.cuda_on_cpu.device import Device


def eighths(*shape: int, dtype: torch.dtype) -> Tensor:
    """Numbers whose products add up without rounding."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randint(-4, 5, shape, generator=generator) / 8).to(dtype)


class Case:
    """The gate's and the value's weights and rows for them, in guarded memory."""

    def __init__(
        self,
        device: Device,
        rows: int,
        size_in: int,
        inner: int,
        dtype: torch.dtype,
        *,
        bias: bool = False,
        offset: int = 0,
        row_stride: int | None = None,
        noise: float = 0,
    ) -> None:
        self.device, self.size_in, self.inner, self.dtype = device, size_in, inner, dtype
        # Both in one matrix, as Phi-3 has them.
        weights = eighths(2 * inner, row_stride or size_in, dtype=dtype)
        weights += noise * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.weights = device.tensor(weights, offset)
        self.bias = device.tensor(eighths(2 * inner, dtype=dtype), offset) if bias else None
        self.x = device.tensor(eighths(rows, size_in, dtype=dtype), offset)

    def layer(self, half: int) -> structures.Linear:
        inner = slice(half * self.inner, (half + 1) * self.inner)
        bias = None if self.bias is None else self.bias[inner]
        weight = self.weights[inner]
        stride = self.weights.stride(0)
        return structures.Linear(
            weight.data_ptr(), TYPES[self.dtype], self.inner, self.size_in, stride, False, pointer(bias)
        )

    def expected(self, activation: Activation) -> Tensor:
        bias = torch.zeros(2 * self.inner) if self.bias is None else self.bias
        both, _ = linear(self.x, self.weights[:, : self.size_in], bias)
        return gated_mlp_in(both[:, : self.inner], both[:, self.inner :], activation, self.dtype)

    def run(self, activation: Activation, x: Tensor | None = None) -> Tensor:
        rows = self.x if x is None else x
        inner = self.device.empty(len(rows), self.inner + 2, dtype=self.dtype)
        self.device.load("gated_mlp.cu").gated_mlp_in(
            self.layer(0),
            self.layer(1),
            activation,
            rows,
            len(rows),
            rows.stride(0),
            inner,
            inner.stride(0),
            None,
        )
        assert inner[:, self.inner :].isnan().all()
        return inner[:, : self.inner]


def assert_close(inner: Tensor, expected: Tensor) -> None:
    """But for an exponential's last bit and what a rounding makes of it."""
    torch.testing.assert_close(inner, expected, rtol=2 * torch.finfo(inner.dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 8, 16), (8, 100, 21), (9, 264, 40), (16, 1090, 7)], ids=str)
def test_shapes(device: Device, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = Case(device, *shape, dtype, bias=True)
    assert_close(case.run(Activation.SILU), case.expected(Activation.SILU))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", Activation)
def test_activations(device: Device, activation: Activation, dtype: torch.dtype) -> None:
    case = Case(device, 2, 40, 33, dtype)
    assert_close(case.run(activation), case.expected(activation))


@pytest.mark.parametrize("dtype", TYPES)
def test_each_product_is_rounded(device: Device, dtype: torch.dtype) -> None:
    """With nothing to approximate every bit is known."""
    case = Case(device, 3, 1100, 40, dtype, bias=True)
    assert torch.equal(case.run(Activation.RELU), case.expected(Activation.RELU))


@pytest.mark.parametrize("dtype", TYPES)
def test_places_in_memory(device: Device, dtype: torch.dtype) -> None:
    for fields in ({"offset": 4}, {"row_stride": 136}, {"row_stride": 141, "bias": True}):
        case = Case(device, 3, 128, 24, dtype, **fields)
        assert_close(case.run(Activation.SILU), case.expected(Activation.SILU))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_alone_has_the_bits_that_it_has_among_others(device: Device, dtype: torch.dtype) -> None:
    case = Case(device, 16, 1100, 18, dtype, noise=0.1)
    together = case.run(Activation.GELU)
    for rows in (slice(0, 1), slice(7, 8), slice(15, 16), slice(3, 8), slice(4, 15)):
        assert torch.equal(case.run(Activation.GELU, case.x[rows]), together[rows])
    # The test sees one k that is missing.
    case.x[:, 1099] = 0
    assert not torch.equal(case.run(Activation.GELU), together)
