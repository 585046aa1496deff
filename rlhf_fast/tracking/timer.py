"""Where a step's time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Seconds by phase: `with timer("rollout"): ...`, then `pop()`.

    On a CUDA device work is only queued, so the device is waited for where a phase begins and where it ends, and
    nowhere in between. A phase that is entered several times adds up. `entered` is told each time.
    """

    def __init__(
        self, device: torch.device | str = "cpu", *, entered: Callable[[str], None] = lambda phase: None
    ) -> None:
        self._device = torch.device(device)
        self._entered = entered
        self._seconds: dict[str, float] = {}

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._entered(phase)
        start = self._now()
        yield  # no finally: after an error there is no step to report, and a failed device must not be waited for
        self._seconds[phase] = self._seconds.get(phase, 0.0) + self._now() - start

    def pop(self) -> dict[str, float]:
        """{"time/<phase>": seconds} since the last call, phases in the order they were first entered."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{phase}": value for phase, value in seconds.items()}
