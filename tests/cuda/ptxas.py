"""What CUDA's assembler says of kernels, which nvcc and NVRTC both end with."""

from __future__ import annotations

import re
import subprocess


def resources(said: str) -> dict[str, dict[str, int]]:
    """Kernel -> registers, bytes of static shared memory, stack and spills, from what ptxas -v says."""
    table: dict[str, dict[str, int]] = {}
    for part in said.split("Compiling entry function '")[1:]:
        numbers = {
            name: sum(map(int, re.findall(pattern, part)))
            for name, pattern in {
                "registers": r"Used (\d+) registers",
                "shared": r"(\d+) bytes smem",
                "stack": r"(\d+) bytes stack frame",
                "spills": r"(\d+) bytes spill",
                "local": r"(\d+) bytes lmem",
            }.items()
        }
        table[part.partition("'")[0]] = numbers
    return table


def readable(symbols: list[str]) -> list[str]:
    done = subprocess.run(["c++filt", *symbols], capture_output=True, text=True, check=True)
    return [name.removeprefix("void ").replace("rlhf_fast::cuda::", "").partition("(")[0] for name in
            done.stdout.replace("(anonymous namespace)::", "").splitlines()]  # fmt: skip


def check_registers(table: dict[str, dict[str, int]], where: str) -> None:
    """No kernel keeps variables in memory. What each takes is printed."""
    for name, numbers in zip(readable(list(table)), table.values(), strict=True):
        print(f"{where} {name}: {numbers['registers']} registers, {numbers['shared']} bytes shared")
        in_memory = {kind: numbers[kind] for kind in ("stack", "spills", "local") if numbers[kind]}
        assert not in_memory, f"{where} {name}: {in_memory} bytes"
