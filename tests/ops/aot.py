"""Triton kernels compiled for a GPU that is not there: what the compiler made of them.

Compiling needs Triton's compiler, not the interpreter that the tests run with. So a test module is also a program that
compiles and prints what it found, and its tests run it as one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CASES = [("bf16", 80), ("bf16", 90), ("bf16", 100), ("fp32", 90)]  # of kernels on logits
cases = pytest.mark.parametrize(("dtype", "arch"), CASES)


def facts_of(module: str, *arguments: str) -> dict[str, dict[str, Any]]:
    """What the module prints as a program, in a process without the interpreter: JSON, facts by name."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def compile_kernel(
    function: Any,
    arch: int,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
    *,
    multiples_of_16: Collection[str] = (),
) -> dict[str, Any]:
    """Compile a triton.jit function for sm_<arch>; pointers are aligned to 16 bytes, as the launchers hand them over.

    types: of the arguments, "*fp32" and so on; an argument with none is a constant, None where constants has no value.

    Returns REG, STACK, LOCAL (cuobjdump's; spilled registers live on the stack, in local memory), shared bytes, the
    16-byte loads and stores, and the intermediate code.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={name: constants[name] for name in names if name in constants},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if types.get(name, "").startswith("*") or name in multiples_of_16
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _resources(compiled.asm["cubin"]))
    return {
        **{key: int(value) for key, value in usage},
        "shared": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"])),
        "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32", compiled.asm["ptx"])),
        "ttir": compiled.asm["ttir"],
        "ttgir": compiled.asm["ttgir"],
    }


def assert_fits(facts: dict[str, Any], *, registers: int, shared: int) -> None:
    """No spills, and at most so many registers a thread and bytes of shared memory a block."""
    assert facts["STACK"] == facts["LOCAL"] == 0
    assert facts["REG"] <= registers
    assert facts["shared"] <= shared


def assert_row_offsets_have_64_bits(facts: dict[str, Any]) -> None:
    """Strides are multiplied in 64 bits, though they come as 32-bit numbers where they fit."""
    for stride in ("outer_stride", "inner_stride"):
        assert re.search(rf"arith\.extsi %{stride}\b.* : i32 to i64", facts["ttir"])
        assert not re.search(rf"arith\.muli .*%{stride}\b.* : i32", facts["ttir"])


def _resources(cubin: bytes) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
