"""Phase times and peak memory."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from rlhf_fast.tracking import PhaseTimer, peak_memory_gb


def test_phases_add_up_and_pop_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.0, 10.0, 10.5, 20.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer = PhaseTimer()
    for phase in ("rollout", "score", "rollout"):
        with timer(phase):
            pass
    assert timer.pop() == {"time/rollout": 3.0, "time/score": 0.5}
    assert timer.pop() == {}


def test_cuda_is_waited_for_at_the_borders_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(f"wait {device}"))
    timer = PhaseTimer("cuda:0")
    with timer("train"):
        seen.append("work")
    assert seen == ["wait cuda:0", "work", "wait cuda:0"]


def test_peak_memory_is_what_the_kernel_says() -> None:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    kibibytes = int(line.split()[1])
    assert peak_memory_gb() == pytest.approx(kibibytes * 1024 / 1e9, rel=0.05)
