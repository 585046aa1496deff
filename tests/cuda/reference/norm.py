from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tests.cuda.structures import NormKind


@dataclass(frozen=True)
class Norm:
    """kernels.h's, with tensors: weight and bias [size] float32, or None for ones and zeros."""

    kind: NormKind = NormKind.NONE
    weight: Tensor | None = None
    bias: Tensor | None = None
    epsilon: float = 1e-5
    round_before_weight: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """norm(x) over the last dimension, in x's type."""
        if self.kind == NormKind.NONE:
            return x
        y = x.double()
        if self.kind == NormKind.LAYER:
            y = y - y.mean(-1, keepdim=True)
        y = y / (y.square().mean(-1, keepdim=True) + self.epsilon).sqrt()
        if self.round_before_weight:
            y = y.to(x.dtype).double()
        if self.weight is not None:
            y = y * self.weight
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)


def add_norm(
    out_norm: Norm, x: Tensor | None, residual_scale: float, residual: Tensor, norm: Norm
) -> tuple[Tensor, Tensor]:
    """(the new residual, y), both [rows, size] in residual's type."""
    if x is not None:
        residual = (out_norm(x).float() * residual_scale).to(x.dtype) + residual
    return residual, norm(residual)
