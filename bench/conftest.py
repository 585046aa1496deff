"""What the benches share: a summary of each group in ratios, and the machine they were taken on.

A group is one job done by several: "rlhf_fast..." is ours, "floor..." is the least that memory allows, measured in the
same run, and the rest are peers. Run with `rlhf-fast bench` or `make bench`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import pytest
import torch


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """After pytest-benchmark's table: median times, ours against each peer, and the share of the floor."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for bench in session.benchmarks if session else []:
        if not bench.has_error and bench.stats.rounds:
            groups[bench.group][bench.param] = bench.stats.median
    for group, medians in groups.items():
        terminalreporter.section(group)
        for name in sorted(medians, key=lambda name: medians[name]):
            terminalreporter.write_line(f"{name:<40} {1e3 * medians[name]:9.2f} ms{_compared(name, medians)}")
    if groups:
        huge = os.environ.get("THP_MEM_ALLOC_ENABLE", "not set")
        machine = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        terminalreporter.write_line(f"\n{machine}, torch {torch.__version__}, THP_MEM_ALLOC_ENABLE {huge}")


def _compared(name: str, medians: dict[str, float]) -> str:
    """For one of ours: how many times faster than each peer, and what part of its time the floor is."""
    if not name.startswith("rlhf_fast"):
        return ""
    peers = [
        f"{medians[peer] / medians[name]:.2f}x {peer}" for peer in medians if not peer.startswith(("rlhf", "floor"))
    ]
    floors = [f"{medians[floor] / medians[name]:.0%} of {floor}" for floor in medians if floor.startswith("floor")]
    return "   " + ", ".join(peers + floors)
