"""gather_logprobs' Triton kernels compiled for A100, H100 and B200 without one: what the compiler made of them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.ops.aot import CASES, assert_fits, assert_row_offsets_have_64_bits, cases, compile_kernel, facts_of

KERNELS = ["forward", "backward"]
kernels = pytest.mark.parametrize("kernel", KERNELS)


def compile_one(kernel: str, dtype: str, arch: int) -> dict[str, Any]:
    """As the launcher would for a large vocabulary of any size, on any strides."""
    from rlhf_fast.kernels import gather_logprobs as module

    pointers = dict.fromkeys(("logprobs", "entropy", "stats", "grad_logprobs", "grad_entropy"), "*fp32")
    pointers |= {"ids": "*i64", "logits": f"*{dtype}", "grad_logits": f"*{dtype}"}
    integers = dict.fromkeys(("offset", "inner", "outer_stride", "inner_stride", "vocabulary", "ignore_index"), "i32")
    constants = {"ENTROPY": True, "SAME_LAYOUT": True, "THREADS": 1024, "VECTOR": 8 if dtype == "bf16" else 4}
    options = {"num_warps": 8, "enable_fp_fusion": True}
    function = getattr(module, f"_{kernel}_kernel")
    return compile_kernel(function, arch, {**pointers, **integers, "scale": "fp32"}, constants, options)


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    return facts_of("tests.ops.test_gather_logprobs_aot")


@cases
@kernels
def test_fits_the_machine(compiled: dict[str, dict[str, Any]], kernel: str, dtype: str, arch: int) -> None:
    """No spills; registers and shared memory for two blocks of 256 threads on a multiprocessor."""
    assert_fits(compiled[f"{kernel} {dtype} {arch}"], registers=128, shared=16 * 1024)


@cases
@kernels
def test_memory_is_read_and_written_by_16_bytes(
    compiled: dict[str, dict[str, Any]], kernel: str, dtype: str, arch: int
) -> None:
    facts = compiled[f"{kernel} {dtype} {arch}"]
    assert facts["wide_loads"] >= 4  # all that a thread has in flight
    assert facts["wide_stores"] >= (4 if kernel == "backward" else 0)


@cases
def test_a_row_is_summed_alike_wherever_it_lies(compiled: dict[str, dict[str, Any]], dtype: str, arch: int) -> None:
    """Whether a row can be loaded by whole vectors or not, the same threads hold the same logits: one layout."""
    layouts = set(
        re.findall(r"tt\.load .*tensor<1024x\dx!tt\.ptr<\w+>, (#\w+)>", compiled[f"forward {dtype} {arch}"]["ttgir"])
    )
    assert len(layouts) == 1


@cases
@kernels
def test_row_offsets_have_64_bits(compiled: dict[str, dict[str, Any]], kernel: str, dtype: str, arch: int) -> None:
    assert_row_offsets_have_64_bits(compiled[f"{kernel} {dtype} {arch}"])


if __name__ == "__main__":
    print(json.dumps({f"{k} {d} {a}": compile_one(k, d, a) for k in KERNELS for d, a in CASES}))
