"""The decoder's product against float64, and that a row's bits depend on nothing but the row and the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_fast.build import load_generation

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """x [M, in] float32, numbers that a bfloat16 can be where the weight is one; weight [out, in] ([in, out] when
    transposed); rows may be strided. NaN is where none wrote."""
    module = load_generation()
    size_in, size_out = weight.shape if transposed else weight.shape[::-1]
    y = torch.full((x.shape[0], size_out + 3), float("nan"))  # strided too
    module.linear(
        weight=weight.data_ptr(),
        type=getattr(module.WeightType, str(weight.dtype).removeprefix("torch.")),
        out=size_out,
        **{"in": size_in},
        row_stride=weight.stride(0),
        transposed=transposed,
        bias=0 if bias is None else bias.data_ptr(),
        x=x.data_ptr(),
        rows=x.shape[0],
        x_stride=x.stride(0),
        y=y.data_ptr(),
        y_stride=y.stride(0),
    )
    assert y[:, size_out:].isnan().all()  # nothing is written beyond a row
    return y[:, :size_out]


def case(
    rows: int, size_in: int, size_out: int, dtype: torch.dtype, *, transposed: bool = False, gap: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias with `gap` elements of NaN after each row."""
    generator = torch.Generator().manual_seed(rows + 100 * size_in + size_out)

    def matrix(height: int, width: int) -> Tensor:
        whole = torch.full((height, width + gap), float("nan"))
        whole[:, :width] = torch.randn(height, width, generator=generator)
        return whole

    weight = matrix(size_in, size_out) if transposed else matrix(size_out, size_in)
    x = matrix(rows, size_in)
    return (
        (x.bfloat16().float() if dtype == torch.bfloat16 else x)[:, :size_in],
        weight.to(dtype)[:, : size_out if transposed else size_in],
        torch.randn(size_out, generator=generator).to(dtype),
    )


def expected(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    y = x.double() @ (weight.double() if transposed else weight.double().T)
    return y if bias is None else y + bias.double()


# K below, at and beyond multiples of every vector's width and of the blocks; N that fills no panel; M in every kernel.
SHAPES = [
    (1, 1, 1),
    (1, 7, 5),
    (1, 64, 33),
    (1, 1030, 300),
    (2, 33, 4),
    (3, 16, 1),
    (4, 100, 67),
    (5, 288, 131),
    (7, 4100, 9),
    (8, 70, 20),
    (9, 1040, 40),
    (13, 577, 66),
    (64, 96, 50),
    (70, 31, 7),
    (301, 40, 12),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64(shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool) -> None:
    for gap in (0, 5):
        x, weight, bias = case(*shape, dtype, transposed=transposed, gap=gap)
        # float's rounding, whatever the weights' type: it grows with the products that a lane adds one after another,
        # all K of them when transposed
        tolerance = 2e-7 * max(shape[1], 16)
        torch.testing.assert_close(
            linear(x, weight, transposed=transposed).double(),
            expected(x, weight, transposed=transposed),
            rtol=1e-6,
            atol=tolerance,
        )
        torch.testing.assert_close(
            linear(x, weight, bias, transposed=transposed).double(),
            expected(x, weight, bias, transposed=transposed),
            rtol=1e-6,
            atol=tolerance,
        )


@pytest.mark.parametrize("transposed", [False, True])
def test_no_rows(transposed: bool) -> None:
    x, weight, bias = case(0, 8, 5, torch.float32, transposed=transposed)
    assert linear(x, weight, bias, transposed=transposed).shape == (0, 5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_go_through(dtype: torch.dtype, transposed: bool) -> None:
    """To the outputs that they belong to, and to no other."""
    x, weight, _ = case(5, 37, 21, dtype, transposed=transposed)
    rows = weight.T if transposed else weight
    x[1, 3], x[2, 36] = float("nan"), float("inf")
    rows[4, 0], rows[20, 35] = float("inf"), float("nan")
    found, plain = linear(x, weight, transposed=transposed), expected(x, weight, transposed=transposed)
    assert found.isnan().equal(plain.isnan())
    assert found.isinf().equal(plain.isinf())
    assert found[found.isinf()].double().equal(plain[plain.isinf()])
    assert found[0].isnan().nonzero().tolist() == [[20]]
    assert found[1].isnan().all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size_in", [33, 288, 1024, 2050])
def test_bfloat16_sums_are_those_of_training(size_in: int, transposed: bool) -> None:
    """After rounding PyTorch's own product has the same bits where both multiply pairs of bfloat16 and no tiles, and
    elsewhere nearly always."""
    chosen = load_generation().instruction_set() == "avx512"
    pairs = chosen and torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    for rows in (2, 8, 9, 64, 130):
        x, weight, bias = case(rows, size_in, 50, torch.bfloat16, transposed=transposed)
        theirs = torch.nn.functional.linear(x.bfloat16(), weight.T if transposed else weight, bias)
        differing = linear(x, weight, bias, transposed=transposed).bfloat16() != theirs
        assert differing.float().mean() <= (0 if pairs else 0.002)


def rows_depend_on_their_number(product: object, x: Tensor) -> bool:
    """Whether any row of the product changes with the rows that come with it."""
    whole = product(x)  # type: ignore[operator]
    for rows in range(1, len(x) + 1):
        for start in (0, len(x) - rows):
            if not product(x[start : start + rows]).equal(whole[start : start + rows]):  # type: ignore[operator]
                return True
    return False


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_their_number(dtype: torch.dtype, transposed: bool) -> None:
    for size_in in (45, 1100):
        x, weight, bias = case(70, size_in, 29, dtype, transposed=transposed)
        assert not rows_depend_on_their_number(lambda x: linear(x, weight, bias, transposed=transposed), x)  # noqa: B023


def test_the_test_can_say_yes() -> None:
    """A product that sums in halves when there are many rows: equal to float64's within rounding, unequal in bits."""
    x, weight, _ = case(70, 1100, 29, torch.float32)

    def in_halves(x: Tensor) -> Tensor:
        if len(x) < 4:
            return linear(x, weight)
        return linear(x[:, :550], weight[:, :550]) + linear(x[:, 550:], weight[:, 550:])

    torch.testing.assert_close(in_halves(x).double(), expected(x, weight), rtol=1e-6, atol=4e-5)
    assert rows_depend_on_their_number(in_halves, x)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, transposed: bool) -> None:
    before = torch.get_num_threads()
    try:
        for rows in (1, 3, 50):
            x, weight, bias = case(rows, 300, 333, dtype, transposed=transposed)
            found = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                found.append(linear(x, weight, bias, transposed=transposed))
            assert all(y.equal(found[0]) for y in found)
    finally:
        torch.set_num_threads(before)
