"""What a run of the benches found: each group as ratios and shares, in lines for a terminal, JSON and Markdown.

A group is one job done by several. A name that starts with "rlhf_fast" is ours, one that starts with "floor" is the
least that the machine allows, measured in the same run, and the rest are peers. A bench may say in
`benchmark.extra_info` how many `bytes` the job has to move and how many bytes of `memory` it took beyond its inputs
(bench/memory.py).
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS, FLOOR = "rlhf_fast", "floor"

# What each kernel does in one pass over its data.
FUSES = {
    "gather_logprobs": "softmax, log-prob, entropy; in the backward the softmax again and the gradient",
    "linear_logprobs": "product with the head by chunks, log-prob, entropy; no logits in memory",
    "logits_ppo_loss": "log-prob, entropy, clipped loss, statistics, gradient over the logits",
    "linear_ppo_loss": "logits_ppo_loss from hidden states, by chunks: three products in all",
    "linear_cross_entropy": "log-prob, accuracy, gradients from hidden states, by chunks: three products in all",
    "ppo_loss": "ratio, clips, KL, entropy bonus, statistics, gradient",
    "value_loss": "clipped error, statistics, gradient",
    "gae": "next-token lookup, scan, returns",
    "shaped_gae": "KL, score, next-token lookup, scan, returns",
    "masked_whiten": "moments, then the shift and scale",
}

GENERATION = ("decode", "ppo_step")  # benches of decoding, and of what it is for


@dataclass
class Group:
    """One job: the seconds that each of its doers took (median), and what they moved and kept."""

    name: str
    op: str  # the bench file's stem
    seconds: dict[str, float] = field(default_factory=dict)
    fastest: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def ours(self) -> list[str]:
        return [name for name in self.seconds if name.startswith(OURS)]

    @property
    def peers(self) -> list[str]:
        return [name for name in self.seconds if not name.startswith((OURS, FLOOR))]

    @property
    def floor(self) -> str | None:
        return next((name for name in self.seconds if name.startswith(FLOOR)), None)

    def times_faster(self, name: str, peer: str) -> float:
        return self.seconds[peer] / self.seconds[name]

    def floor_share(self, name: str) -> float | None:
        """What part of its time the floor is; 1 is the floor itself."""
        return None if self.floor is None else self.seconds[self.floor] / self.seconds[name]

    def rate(self, name: str) -> float | None:
        """GB/s."""
        return self.bytes[name] / self.seconds[name] / 1e9 if name in self.bytes else None


def collect(benchmarks: Iterable[Any]) -> list[Group]:
    """pytest-benchmark's results as groups, in the order in which they ran."""
    groups: dict[str, Group] = {}
    for bench in benchmarks:
        if bench.has_error or not bench.stats.rounds:
            continue
        op = Path(bench.fullname.partition("::")[0]).stem.removeprefix("bench_")
        group = groups.setdefault(bench.group, Group(bench.group, op))
        group.seconds[bench.param] = bench.stats.median
        group.fastest[bench.param] = bench.stats.min
        if "bytes" in bench.extra_info:
            group.bytes[bench.param] = bench.extra_info["bytes"]
        if "memory" in bench.extra_info:
            group.memory[bench.param] = bench.extra_info["memory"]
    return list(groups.values())


def machine(threads: int, instruction_set: str, huge_pages: str) -> dict[str, Any]:
    """Where and when the run was."""
    packages = ("torch", "triton", "transformers", "deepspeed")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "threads": threads,
        "instruction_set": instruction_set,
        "THP_MEM_ALLOC_ENABLE": huge_pages,
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def gpu(groups: list[Group], name: str) -> dict[str, Any]:
    """More of where the run was: the GPU, and what bench_machine.py measured of it."""
    found: dict[str, Any] = {"gpu": name}
    for group in groups:
        if group.op == "machine" and group.floor is not None:
            rate = group.rate(group.floor)
            what = f"{rate:,.0f} GB/s" if rate else f"{short(1e3 * group.seconds[group.floor])} ms"
            found[group.name.removeprefix("machine: ")] = what
    return found


def stem(where: dict[str, Any]) -> str:
    """A file name for the run: its date and its machine, and what was not as usual."""
    processor = re.sub(r"[^a-z0-9]+", "-", where["processor"].lower()).strip("-")
    pages = "-small-pages" if where["THP_MEM_ALLOC_ENABLE"] == "0" else ""
    if "gpu" in where:
        return f"{where['date']}-{re.sub(r'[^a-z0-9]+', '-', where['gpu'].lower()).strip('-')}"
    return f"{where['date']}-{processor}-{where['threads']}-threads{pages}"


def lines(group: Group) -> list[str]:
    """The group for a terminal, fastest first."""
    found = []
    for name in sorted(group.seconds, key=lambda name: group.seconds[name]):
        rate = group.rate(name)
        text = f"{name:<44} {1e3 * group.seconds[name]:10.3f} ms"
        text += f" {group.bytes[name] / 1e6:8.1f} MB {rate:7.1f} GB/s" if rate else ""
        if name in group.memory:
            text += f" {group.memory[name] / 2**20:8.1f} MiB"
        if name in group.ours:
            compared = [f"{group.times_faster(name, peer):.2f}x {peer}" for peer in group.peers]
            share = group.floor_share(name)
            compared += [] if share is None else [f"{share:.0%} of the {group.floor}"]
            text += "   " + ", ".join(compared)
        found.append(text)
    return found


def tables(groups: list[Group], where: dict[str, Any]) -> dict[str, str]:
    """Markdown of the kernels, what each fuses and how they compare; of generation; of the rest of the benches. One row
    for each of ours. What was not measured is missing."""
    facts = ", ".join(f"{key} {value}" for key, value in where.items())
    chosen = {
        "kernels": [group for group in groups if group.op in FUSES],
        "generation": [group for group in groups if group.op in GENERATION],
        "rest": [group for group in groups if group.op not in (*FUSES, *GENERATION)],
    }
    return {
        name: f"{_table(chosen[name], kernels=name == 'kernels')}\nMedian times; {facts}.\n"
        for name in chosen
        if chosen[name]
    }


def markdown(groups: list[Group], where: dict[str, Any]) -> str:
    """All tables."""
    return "\n".join(tables(groups, where).values())


def _table(groups: list[Group], *, kernels: bool) -> str:
    """Of kernels also what each fuses, and the bytes that the job has to move."""
    columns = ["job", *(["in one pass"] if kernels else []), "ms", *(["MB", "GB/s"] if kernels else [])]
    columns += ["faster than", "share of the floor", "extra memory"]
    rows = [columns, ["---"] * len(columns)]
    for group in groups:
        for name in group.ours:
            label = group.name + ("" if name == OURS else f" ({name.removeprefix(OURS).strip(' ,:')})")
            peers = ", ".join(f"{short(group.times_faster(name, peer))}x {peer}" for peer in group.peers) or "no peer"
            share = group.floor_share(name)
            floor = "" if share is None or group.floor is None else f"{share:.0%} ({group.floor.partition(': ')[2]})"
            memory = f"{group.memory[name] / 2**20:.1f} MiB" if name in group.memory else ""
            rate = group.rate(name)
            moved = [f"{group.bytes[name] / 1e6:.1f}", f"{rate:.1f}"] if rate else ["", ""]
            cells = [label, *([FUSES[group.op]] if kernels else []), short(1e3 * group.seconds[name])]
            rows.append([*cells, *(moved if kernels else []), peers, floor, memory])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def short(x: float) -> str:
    """Three digits, and no power of ten."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
