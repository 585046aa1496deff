"""What the benches share: a summary in ratios after each run and, with --results, the files in bench/results/.

Run with `rlhf-fast bench` (`-- -k forward` for some) or `make bench` (all, and write the files).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import summary
from bench.picture import draw


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results", type=Path, metavar="DIR", help="write what was measured to DIR as JSON, Markdown, PNG"
    )


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """After pytest-benchmark's table: median times, ours against each peer, and the share of the floor."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    groups = summary.collect(session.benchmarks if session else [])
    if not groups:
        return
    for group in groups:
        terminalreporter.section(group.name)
        for line in summary.lines(group):
            terminalreporter.write_line(line)
    where = summary.machine(
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
        os.environ.get("THP_MEM_ALLOC_ENABLE", "not set"),
    )
    if any(group.op == "machine" for group in groups):
        where |= summary.gpu(groups, torch.cuda.get_device_name())
    terminalreporter.write_line("\n" + ", ".join(f"{key} {value}" for key, value in where.items()))
    folder = terminalreporter.config.getoption("--results")
    if folder is not None:
        for file in _write(groups, where, folder):
            terminalreporter.write_line(f"wrote {file}")


def _write(groups: list[summary.Group], where: dict[str, Any], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / summary.stem(where)
    found = {"machine": where, "groups": [asdict(group) for group in groups]}
    files = [stem.with_suffix(suffix) for suffix in (".json", ".md", ".png")]
    files[0].write_text(json.dumps(found, indent=1) + "\n")
    files[1].write_text(summary.markdown(groups, where))
    draw(groups, files[2])
    return files
