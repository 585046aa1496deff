"""logits_ppo_loss' Triton kernels compiled for A100, H100 and B200 without one: what the compiler made of them.

Compiling needs Triton's compiler, not the interpreter that the other tests run with, hence a process of its own: this
module as a program, which prints what it found.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.ops.test_gather_logprobs_aot import CASES, ROOT, cases, resources

KERNELS = ["ppo", "cross_entropy"]
kernels = pytest.mark.parametrize("kernel", KERNELS)


def compile_kernel(kernel: str, dtype: str, arch: int) -> dict[str, Any]:
    """Compile with every option, as the launcher would for a large vocabulary of any size, on any strides."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rlhf_fast.kernels import logits_ppo_loss as module

    function = getattr(module, f"_{kernel}_kernel")
    floats = ("old_logprobs", "advantages", "weights", "ref_logprobs", "num_tokens", "found")
    pointers = dict.fromkeys(floats, "*fp32") | {"ids": "*i64", "mask": "*i1", "logits": f"*{dtype}"}
    integers = dict.fromkeys(("rows", "offset", "inner", "outer_stride", "inner_stride", "vocabulary"), "i32")
    numbers = dict.fromkeys(("scale", "clip_low", "clip_high", "dual_clip", "kl_coef", "entropy_coef"), "fp32")
    types = {**pointers, **integers, **numbers}
    constants = {"DUAL_CLIP": True, "KL": 3, "THREADS": 1024, "VECTOR": 8 if dtype == "bf16" else 4}
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={name: constants[name] for name in names if name in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers},
    )
    options = {"num_warps": 8, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        "resources": resources(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
        "ttir": compiled.asm["ttir"],
    }


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.test_logits_ppo_loss_aot"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@cases
@kernels
def test_fits_the_machine(compiled: dict[str, dict[str, Any]], kernel: str, dtype: str, arch: int) -> None:
    """No spills; registers and shared memory for two blocks of 256 threads on a multiprocessor."""
    facts = compiled[f"{kernel} {dtype} {arch}"]
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", facts["resources"])}
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert usage["REG"] <= 128
    assert facts["shared"] <= 16 * 1024


@cases
@kernels
def test_memory_is_read_and_written_by_16_bytes(
    compiled: dict[str, dict[str, Any]], kernel: str, dtype: str, arch: int
) -> None:
    facts = compiled[f"{kernel} {dtype} {arch}"]
    assert facts["wide_loads"] >= 8  # all that a thread has in flight, in each of the two passes
    assert facts["wide_stores"] >= 4


@cases
@kernels
def test_no_thread_writes_before_all_have_read(
    compiled: dict[str, dict[str, Any]], kernel: str, dtype: str, arch: int
) -> None:
    """A barrier stands between the first pass, where every thread loads the id's logit, and the first write."""
    ttir = compiled[f"{kernel} {dtype} {arch}"]["ttir"]
    barrier = re.search(r"\b(ttg|gpu)\.barrier\b", ttir)
    write = re.search(r"tt\.store .*tensor<1024x", ttir)
    assert barrier
    assert write
    assert ttir.index("%chosen") < barrier.start() < write.start()


@cases
@kernels
def test_row_offsets_have_64_bits(compiled: dict[str, dict[str, Any]], kernel: str, dtype: str, arch: int) -> None:
    """Strides are multiplied in 64 bits, though they come as 32-bit numbers where they fit."""
    ttir = compiled[f"{kernel} {dtype} {arch}"]["ttir"]
    for stride in ("outer_stride", "inner_stride"):
        assert re.search(rf"arith\.extsi %{stride}\b.* : i32 to i64", ttir)
        assert not re.search(rf"arith\.muli .*%{stride}\b.* : i32", ttir)


if __name__ == "__main__":
    print(json.dumps({f"{k} {d} {a}": compile_kernel(k, d, a) for k in KERNELS for d, a in CASES}))
