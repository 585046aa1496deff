"""Weights of a frozen model that lie in the host's memory except while the model is asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

Loaded = Callable[[], contextlib.AbstractContextManager[None]]  # inside, a model's weights are where it runs


def place_frozen(module: nn.Module, device: torch.device, *, offload: bool) -> Loaded:
    """Put a module that is never trained on `device`, or its weights there only while they are asked: offload, which
    says nothing on a CPU. Returns what to enter whenever the module is asked."""
    if offload and device.type != "cpu":
        return OffloadedWeights(module, device).loaded
    module.to(device)
    return contextlib.nullcontext


class OffloadedWeights:
    """The weights of a module that is never trained: in the host's memory, and on `device` inside loaded().

    For a GPU they are pinned, so that they are sent at the bus's full rate and the host does not wait. Nothing comes
    back: the host's weights are still there, and the device's are dropped. Buffers, which are small, stay on `device`.
    """

    @torch.no_grad()
    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device = device
        self._parameters = list(module.parameters())  # a tied one once
        for buffer in module.buffers():
            buffer.data = buffer.data.to(device)
        for parameter in self._parameters:
            host = parameter.data.to("cpu")
            parameter.data = host.pin_memory() if device.type == "cuda" else host
        self._host = [parameter.data for parameter in self._parameters]

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """Inside, the module's weights are a copy on the device. Read them only: what is written is lost."""
        try:
            for parameter, host in zip(self._parameters, self._host, strict=True):
                parameter.data = host.to(self.device, non_blocking=True, copy=True)
            yield
        finally:
            for parameter, host in zip(self._parameters, self._host, strict=True):
                parameter.data = host
