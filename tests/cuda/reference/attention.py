from __future__ import annotations

import torch
from torch import Tensor


def attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float, cap: float, window: int) -> Tensor:
    """One token's queries [heads, size] against the last of its keys and values [positions, key-value heads, size].

    Returns [heads, size] in queries' type. cap 0: none; window 0: all positions.
    """
    first = max(len(keys) - window, 0) if window else 0
    group = queries.shape[0] // keys.shape[1]
    kept = (part[first:].double().repeat_interleave(group, dim=1) for part in (keys, values))
    keys, values = kept
    scores = torch.einsum("hd,thd->ht", queries.double(), keys) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    return torch.einsum("ht,thd->hd", scores.softmax(dim=1), values).to(queries.dtype)
