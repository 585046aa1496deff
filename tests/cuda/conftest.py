"""Every test of a kernel takes `device` and so runs in all builds and orders of tests/cuda_on_cpu."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cuda_on_cpu.device import Device

# (build, order); see Device. The random order is one of many, the same in every run.
RUNS = [("plain", 0), ("plain", 1), ("plain", 6), ("checker", 0), ("checker", 1), ("asan", 0)]


@pytest.fixture(params=RUNS, ids=lambda run: f"{run[0]}-{run[1]}")
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """A fresh device. What went wrong in a kernel raises KernelError where Python called it."""
    device = Device(*request.param)
    yield device
    device.close()
    device.check()
