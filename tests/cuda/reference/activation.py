from __future__ import annotations

from torch import Tensor

from tests.cuda.reference.gated_mlp import ACTIVATIONS
from tests.cuda.structures import Activation


def activate(activation: Activation, gated: bool, x: Tensor) -> Tensor:
    """activation(x), or of x's first half times the second; in x's type, by transformers' own functions."""
    if not gated:
        return ACTIVATIONS[activation](x)
    first, second = x.chunk(2, dim=1)
    return ACTIVATIONS[activation](first) * second
