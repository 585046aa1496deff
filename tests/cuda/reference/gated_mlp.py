from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import NewGELUActivation

from tests.cuda.structures import Activation

ACTIVATIONS = {
    Activation.RELU: F.relu,
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.GELU_NEW: NewGELUActivation(),
}


def gated_mlp_in(gate: Tensor, value: Tensor, activation: Activation, dtype: torch.dtype) -> Tensor:
    """What the two products, [M, inner] float64, become: each rounded to the model's type, as every step after."""
    activated: Tensor = ACTIVATIONS[activation](gate.to(dtype))
    return activated * value.to(dtype)
