"""Matrix instructions: the registers of the emulated device are those that a GPU gave, once one has."""

from __future__ import annotations

from tests.cuda_on_cpu.device import Device
from tests.gpu.matrix_layout import found_on, golden


def test_registers_are_a_gpus() -> None:
    found, seen = found_on(Device()), golden()
    assert found["load_rows"] != found["load_columns"]
    assert seen is None or {name: seen[name] for name in found} == found
