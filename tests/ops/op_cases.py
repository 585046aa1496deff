"""Random inputs that the op tests share."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

seeds = st.integers(0, 2**31 - 1)


@st.composite
def masks(draw: st.DrawFn, max_rows: int = 4, max_columns: int = 7) -> Tensor:
    """[B, T] bool with B, T >= 1: holes, empty rows and full rows among them."""
    rows, columns = draw(st.integers(1, max_rows)), draw(st.integers(1, max_columns))
    cells = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(cells).reshape(rows, columns)


class Normals:
    """Standard normal tensors, one after the other from one seed."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)


def poison(x: Tensor, mask: Tensor) -> Tensor:
    """x with NaN outside the mask."""
    return torch.where(mask, x, torch.nan)


def assert_zero_outside(x: Tensor, mask: Tensor) -> None:
    """Exactly 0 where the mask is False."""
    assert x.shape == mask.shape
    assert bool((x[~mask] == 0).all()), x


def close(actual: Tensor, expected: object, tolerance: float = 1e-12) -> None:
    """Equal to a tensor, number or nested list up to an absolute and relative tolerance."""
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
