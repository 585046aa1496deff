"""A test of a kernel takes `device`: it runs in all builds and orders of tests/cuda_on_cpu, or with --gpu on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cuda_on_cpu.device import Device

# (build, order); see Device. The random order is one of many, the same in every run.
RUNS = [("plain", 0), ("plain", 1), ("plain", 6), ("checker", 0), ("checker", 1), ("asan", 0)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        runs = [("gpu", 0)] if metafunc.config.getoption("--gpu") else RUNS
        metafunc.parametrize("device", runs, indirect=True, ids=lambda run: f"{run[0]}-{run[1]}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU the other tests of this folder, of the emulator and of nvcc, have nothing to say."""
    if config.getoption("--gpu"):
        here = Path(__file__).parent
        items[:] = [item for item in items if here not in item.path.parents or "device" in item.fixturenames]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """A fresh device. What went wrong in a kernel raises KernelError where Python called it."""
    if request.param[0] == "gpu":
        from tests.gpu.device import Device as Gpu

        device: Device = Gpu()
    else:
        device = Device(*request.param)
    yield device
    device.close()
    device.check()
