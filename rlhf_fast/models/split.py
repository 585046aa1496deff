"""Weights of a frozen model of which each rank holds a part, except while the model is asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from rlhf_fast.distributed import World


class SplitWeights:
    """The weights of a module that is never trained: a part on each rank, whole on all of them inside gathered().

    So ranks may ask it unequally often, which a model under ZeRO-3, gathered layer by layer, does not allow. Weights
    are split parameter by parameter and lie on the world's device; buffers stay whole.
    """

    @torch.no_grad()
    def __init__(self, module: nn.Module, world: World) -> None:
        self._world = world
        self._parameters = list(module.parameters())  # a tied one once
        self._shapes = [parameter.shape for parameter in self._parameters]
        self._parts = []
        for buffer in module.buffers():
            buffer.data = buffer.data.to(world.device)
        for parameter in self._parameters:
            size = -(-parameter.numel() // world.world_size)
            mine = parameter.flatten()[size * world.rank : size * (world.rank + 1)]
            part = torch.zeros(size, dtype=parameter.dtype, device=world.device)
            part[: mine.numel()] = mine
            self._parts.append(part)
        self._drop()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, the module is whole. Every rank enters; there is nothing to wait for on the way out."""
        try:
            for parameter, shape, part in zip(self._parameters, self._shapes, self._parts, strict=True):
                whole = part.new_empty(self._world.world_size * part.numel())
                dist.all_gather_into_tensor(whole, part)
                parameter.data = whole[: shape.numel()].view(shape)
            yield
        finally:
            self._drop()

    def _drop(self) -> None:
        for parameter, part in zip(self._parameters, self._parts, strict=True):
            parameter.data = part.new_empty(0)
