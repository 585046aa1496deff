from __future__ import annotations

import torch
from torch import Tensor


def embed(
    table: Tensor, scale: float, ids: Tensor, position: Tensor, positions: Tensor | None, position_offset: int
) -> Tensor:
    """[tokens, size] in table's type, zeros for padding (position < 0)."""
    real = position >= 0
    x = (table[ids.where(real, 0)].float() * scale).to(table.dtype)
    if positions is not None:
        x = x + positions[(position + position_offset).where(real, 0)]
    return torch.where(real[:, None], x, 0)
