"""GPU time for pytest-benchmark: its clock runs by what CUDA's events measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

CALLS = 10  # between two events, so that launches are ahead of the GPU


class Clock:
    """A timer that runs by what it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


def time_gpu(benchmark: Any, run: Callable[[], object], *, rounds: int = 20, calls: int = CALLS) -> None:
    """Seconds of the GPU for one call of run(), the second-level cache full of something else before each round."""
    flushed = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once() -> None:
        flushed.zero_()
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        CLOCK.now += begin.elapsed_time(end) / 1000 / calls

    for _ in range(3):
        run()
    benchmark.pedantic(once, rounds=rounds)
