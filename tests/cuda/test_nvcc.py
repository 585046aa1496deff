"""nvcc compiles every kernel for every architecture, and none keeps variables in memory: no spills, no stack.

It takes CUDA's compiler and no GPU; pytest -m "not nvcc" leaves it out. The resources of each kernel are printed:
pytest -s tests/cuda/test_nvcc.py
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rlhf_fast.build_cuda import nvcc
from tests.cuda.ptxas import check_registers, resources
from tests.cuda_on_cpu.build import KERNELS

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SOURCES = sorted(path.name for path in KERNELS.glob("*.cu"))


def by_nvcc(source: str, architecture: str, folder: Path) -> dict[str, dict[str, int]]:
    """The resources of all kernels in the file."""
    command = [nvcc(), "-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas=-v", "-Werror=all-warnings"]
    done = subprocess.run(
        [*command, str(KERNELS / source), "-o", str(folder / "out.cubin")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return resources(done.stderr)


@pytest.mark.nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_keep_all_in_registers(source: str, architecture: str, tmp_path: Path) -> None:
    table = by_nvcc(source, architecture, tmp_path)
    has_kernels = "__global__" in (KERNELS / source).read_text()
    assert bool(table) == has_kernels
    check_registers(table, f"{source} {architecture}")


@pytest.mark.nvcc
def test_the_gate_sees_a_stack(tmp_path: Path) -> None:
    """Else it could pass without having read anything."""
    source = tmp_path / "stack.cu"
    source.write_text(
        "__global__ void f(float* x, int n) { float a[64] = {};"
        " for (int i = 0; i < n; ++i) a[(7 * i + n) % 64] += x[i];"
        " for (int i = 0; i < n; ++i) x[i] = a[x[i] > 0 ? i % 64 : 0]; }"
    )
    command = [nvcc(), "-arch=sm_80", "-cubin", "-Xptxas=-v", str(source), "-o", str(tmp_path / "out.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (numbers,) = resources(said).values()
    assert numbers["stack"] >= 256
    assert numbers["registers"] > 0
