"""What the reference ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.config import KLEstimator

IGNORED = -100  # the id of a position that is not looked at
MAX_LOG_RATIO = 20.0  # e^20 = 5e8: far outside any clip range, and finite in fp32 after squaring


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any tensor is float64, float32 otherwise."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def inside(mask: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype, exactly 0 outside the mask. Its gradient is exactly 0 there too: nothing is multiplied by a NaN."""
    return torch.where(mask, x.to(dtype), 0)


def token_count(mask: Tensor, num_tokens: int | float | Tensor | None, dtype: torch.dtype) -> Tensor:
    """The divisor of sums over tokens, as a 0-d tensor: num_tokens or the masked tokens, at least 1."""
    if num_tokens is None:
        return mask.sum().clamp(min=1).to(dtype)
    if isinstance(num_tokens, Tensor):
        return num_tokens.detach().reshape(()).to(dtype).clamp(min=1)
    return torch.full((), num_tokens, dtype=dtype, device=mask.device)  # torch.tensor would wait for the GPU


def kl_terms(difference: Tensor, estimator: KLEstimator) -> Tensor:
    """Per-token estimates of KL(policy || reference) from d = logprob - ref_logprob (Schulman 2020).

    k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d with -d clamped to +-20.
    """
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    log_ratio = (-difference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio
