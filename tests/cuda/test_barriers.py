"""No barrier of a kernel is there for nothing: without any one of them, some case fails."""

from __future__ import annotations

import re
from functools import cache

import pytest

from tests.cuda.cases import CASES
from tests.cuda_on_cpu.build import KERNELS
from tests.cuda_on_cpu.device import Device, KernelError

WAITS = re.compile(r"\b(__syncthreads\w*|__syncwarp|copy_async_wait<\d+>|__threadfence)\(")
RUNS = [("checker", 0), ("checker", 1), ("plain", 0), ("plain", 1), ("plain", 6)]


def lines() -> list[str]:
    """file:line of each barrier, wait and fence in the kernels."""
    found = []
    for path in sorted([*KERNELS.glob("*.cu"), *KERNELS.glob("*.h")]):
        if path.name == "device.h":  # the twins themselves
            continue
        code = [line.partition("//")[0] for line in path.read_text().splitlines()]
        assert all(len(WAITS.findall(line)) <= 1 for line in code), f"{path.name}: two barriers in one line"
        found += [f"{path.name}:{number}" for number, line in enumerate(code, 1) if WAITS.search(line)]
    return found


@cache
def met_by(stem: str, case: int) -> frozenset[str]:
    """The lines that a case comes to. It passes as the kernels are."""
    device = Device("checker")
    device.record_sites(True)
    try:
        CASES[stem][case](device)
    finally:
        sites = device.record_sites(False)
        device.close()
    return frozenset(f"{file.rpartition('/')[2]}:{line}" for file, line in sites)


def fails_without(stem: str, case: int, line: str) -> bool:
    file, _, number = line.partition(":")
    for run in RUNS:
        device = Device(*run)
        device.drop(f"/{file}", int(number))
        try:
            CASES[stem][case](device)
        except (KernelError, AssertionError):
            return True
        finally:
            device.drop()
            device.close()
    return False


@pytest.mark.parametrize("line", lines())
def test_every_barrier_is_needed(line: str) -> None:
    stem = line.partition(".")[0]
    stems = [stem] if line.partition(":")[0].endswith(".cu") else sorted(CASES)
    assert set(stems) <= set(CASES), f"{stem} has no case in tests/cuda/cases.py"
    meeting = [(stem, case) for stem in stems for case in range(len(CASES[stem])) if line in met_by(stem, case)]
    assert meeting, f"no case in tests/cuda/cases.py comes to {line}"
    assert any(fails_without(stem, case, line) for stem, case in meeting), f"nothing fails without {line}"
