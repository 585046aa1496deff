"""linear and linear_many: the product for few rows, against float64; a row's bits depend on nothing but the row."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.cuda import structures
from tests.cuda.reference.linear import linear
from tests.cuda.structures import TYPES, pointer
from tests.cuda_on_cpu.device import Device


def matrix(height: int, width: int, gap: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random rows with `gap` elements of NaN between them."""
    whole = torch.full((height, width + gap), torch.nan)
    whole[:, :width] = torch.randn(height, width, generator=generator)
    return whole.to(dtype)


@dataclass
class Case:
    """A layer and rows for it, in guarded memory. `gap`: elements between rows; `offset`: bytes from 16-byte places."""

    x: Tensor  # [rows, in + gap]
    weight: Tensor  # [out, in + gap], [in, out + gap] when transposed
    bias: Tensor | None
    size_in: int
    size_out: int
    transposed: bool

    @classmethod
    def random(
        cls,
        device: Device,
        rows: int,
        size_in: int,
        size_out: int,
        dtype: torch.dtype,
        *,
        transposed: bool = False,
        bias: bool = True,
        gap: int = 0,
        offset: int = 0,
    ) -> Case:
        generator = torch.Generator().manual_seed(1000 * size_in + size_out)
        height, width = (size_in, size_out) if transposed else (size_out, size_in)
        weight = matrix(height, width, gap, dtype, generator)
        terms = matrix(1, size_out, 0, dtype, generator)[0]
        x = matrix(rows, size_in, gap, dtype, generator)
        return cls(
            device.tensor(x, offset),
            device.tensor(weight, offset),
            device.tensor(terms, offset) if bias else None,
            size_in,
            size_out,
            transposed,
        )

    @property
    def layer(self) -> structures.Linear:
        return structures.Linear(
            self.weight.data_ptr(),
            TYPES[self.weight.dtype],
            self.size_out,
            self.size_in,
            self.weight.stride(0),
            self.transposed,
            pointer(self.bias),
        )

    def expected(self) -> tuple[Tensor, Tensor]:
        weight = self.weight[:, : self.size_out if self.transposed else self.size_in]
        return linear(self.x[:, : self.size_in], weight, self.bias, transposed=self.transposed)

    def run(self, device: Device, *, out_type: torch.dtype | None = None, x: Tensor | None = None) -> Tensor:
        """y [rows, out], from x instead of its own when given."""
        rows = self.x if x is None else x
        y = device.empty(len(rows), self.size_out + 3, dtype=out_type or self.x.dtype)
        kernels = device.load("linear.cu")
        workspace = zeros(device, kernels.linear_workspace(self.layer))
        kernels.linear(
            self.layer, rows, len(rows), rows.stride(0), TYPES[y.dtype], y, y.stride(0), pointer(workspace), None
        )
        assert y[:, self.size_out :].isnan().all()  # nothing is written beyond a row
        return y[:, : self.size_out]


def zeros(device: Device, size: int) -> Tensor:
    return device.tensor(torch.zeros(size, dtype=torch.uint8))


def assert_close(y: Tensor, expected: Tensor, terms: Tensor) -> None:
    """y is the nearest number of its type, but for a float32 sum's rounding."""
    half_step = 0.0 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps / 2
    allowed = 1.001 * half_step * expected.abs() + 1e-6 * terms + torch.finfo(y.dtype).tiny
    wrong = (~((y.double() - expected).abs() <= allowed)).nonzero()  # NaN is wrong too
    assert len(wrong) == 0, wrong[:5]


# Below, at and beyond a vector, a step, a turn and a block's turns of k; a tile and its parts; both numbers of rows.
# Several blocks share the k of the last three.
SHAPES = [
    (1, 1, 1),
    (2, 7, 5),
    (8, 64, 33),
    (9, 136, 70),
    (5, 200, 2100),
    (1, 1096, 20),
    (16, 2056, 17),
    (3, 1033, 3),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product(device: Device, shape: tuple[int, int, int], transposed: bool, dtype: torch.dtype) -> None:
    case = Case.random(device, *shape, dtype, transposed=transposed)
    assert_close(case.run(device), *case.expected())
    assert_close(case.run(device, out_type=torch.float32), *case.expected())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_places_in_memory(device: Device, transposed: bool, dtype: torch.dtype) -> None:
    """Rows apart, with and without alignment to 16 bytes: the same bits."""
    aligned = Case.random(device, 3, 264, 48, dtype, transposed=transposed)
    assert_close(aligned.run(device), *aligned.expected())
    for gap, offset in ((8, 0), (1, 0), (0, 4), (3, 12)):
        other = Case.random(device, 3, 264, 48, dtype, transposed=transposed, gap=gap, offset=offset)
        other.weight[:, : aligned.weight.shape[1]] = aligned.weight
        other.x[:, :264] = aligned.x
        assert torch.equal(other.run(device), aligned.run(device)), (gap, offset)


@pytest.mark.parametrize("dtype", TYPES)
def test_nothing_is_read_beyond_the_last_row(device: Device, dtype: torch.dtype) -> None:
    """Rows begin at multiples of 16 bytes and do not end there; the last one has nothing behind it."""
    case = Case.random(device, 2, 16, 21, dtype, transposed=True, gap=11)
    case.weight = device.tensor(case.weight.flatten()[:-11]).as_strided((16, 21), (32, 1))
    case.x = device.tensor(case.x[:, :16])
    assert_close(case.run(device), *case.expected())


@pytest.mark.parametrize("dtype", TYPES)
def test_without_bias(device: Device, dtype: torch.dtype) -> None:
    case = Case.random(device, 2, 40, 24, dtype, bias=False)
    assert_close(case.run(device), *case.expected())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_alone_has_the_bits_that_it_has_among_others(
    device: Device, transposed: bool, dtype: torch.dtype
) -> None:
    case = Case.random(device, 16, 1100, 18, dtype, transposed=transposed, gap=4)
    together = case.run(device, out_type=torch.float32)
    for rows in (slice(0, 1), slice(7, 8), slice(15, 16), slice(3, 8), slice(4, 15)):
        assert torch.equal(case.run(device, out_type=torch.float32, x=case.x[rows]), together[rows])

    # Sums in another order do have other bits.
    swapped = case.x.clone()
    swapped[:, :1100] = swapped[:, :1100].flip(1)
    k = 0 if transposed else 1
    case.weight.narrow(k, 0, 1100).copy_(case.weight.narrow(k, 0, 1100).flip(k).clone())
    assert not torch.equal(case.run(device, out_type=torch.float32, x=device.tensor(swapped)), together)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_of_nan_stays_alone(device: Device, dtype: torch.dtype) -> None:
    case = Case.random(device, 4, 72, 20, dtype)
    plain = case.run(device).clone()
    case.x[1] = torch.nan
    case.x[2, 5] = torch.inf
    y = case.run(device)
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    assert torch.equal(y[[0, 3]], plain[[0, 3]])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_layers_side_by_side(device: Device, transposed: bool, dtype: torch.dtype) -> None:
    """What linear_many gives are the bits of linear, also from a workspace that other layers have left behind."""
    cases = [Case.random(device, 3, 520, out, dtype, transposed=transposed, bias=out != 33) for out in (40, 33, 64, 8)]
    x = cases[0].x
    alone = [case.run(device, x=x) for case in cases]
    kernels = device.load("linear.cu")
    sizes = [kernels.linear_workspace(case.layer) for case in cases]
    assert min(sizes) > 0
    workspace = zeros(device, sum(sizes))
    for chosen in ([0], [1, 0], [3, 2, 1], [0, 1, 2, 3], [2, 0]):
        layers = (structures.Linear * len(chosen))(*(cases[i].layer for i in chosen))
        total = sum(cases[i].size_out for i in chosen)
        y = device.empty(3, total, dtype=dtype)
        kernels.linear_many(layers, len(chosen), x, 3, x.stride(0), TYPES[dtype], y, total, workspace, None)
        assert torch.equal(y, torch.cat([alone[i] for i in chosen], dim=1))
