from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.cuda.reference.norm import Norm


@dataclass(frozen=True)
class Rotary:
    """kernels.h's, with tensors: cos and sin [positions, size / 2] float32."""

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def __call__(self, x: Tensor, position: Tensor) -> Tensor:
        """x [tokens, heads, head size] turned; in half precision rounded where transformers' modules round."""
        half = self.cos.shape[1]
        cos, sin = self.cos[position][:, None], self.sin[position][:, None]
        turned = x.clone()
        if self.interleaved:
            a, b = x[..., 0 : 2 * half : 2].float(), x[..., 1 : 2 * half : 2].float()
            turned[..., 0 : 2 * half : 2] = (a * cos - b * sin).to(x.dtype)
            turned[..., 1 : 2 * half : 2] = (b * cos + a * sin).to(x.dtype)
            return turned
        a, b = x[..., :half], x[..., half : 2 * half]
        turned[..., :half] = _product(a, cos) - _product(b, sin)
        turned[..., half : 2 * half] = _product(b, cos) + _product(a, sin)
        return turned


def _product(x: Tensor, factor: Tensor) -> Tensor:
    return (x.float() * factor).to(x.dtype)


def prepare(x: Tensor, position: Tensor, norm: Norm, rotary: Rotary | None, scale: float) -> Tensor:
    """Queries or keys [tokens, heads, head size] as attention takes them: normed, rotated, scaled."""
    x = norm(x)
    if rotary is not None:
        x = rotary(x, position)
    return _product(x, torch.tensor(scale)) if scale != 1 else x
