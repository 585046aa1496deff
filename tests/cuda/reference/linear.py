from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """x [M, in], weight [out, in] ([in, out] when transposed) -> [M, out] float64, and what bounds a sum's rounding.

    The second is the sum of the absolute terms: float32 sums are off by some 1e-7 of it.
    """
    matrix = weight.double() if transposed else weight.double().T
    terms = torch.zeros(1, dtype=torch.float64) if bias is None else bias.double()
    return x.double() @ matrix + terms, x.double().abs() @ matrix.abs() + terms.abs()
