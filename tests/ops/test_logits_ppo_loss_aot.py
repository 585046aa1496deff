"""logits_ppo_loss' Triton kernels compiled for A100, H100 and B200 without one: what the compiler made of them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.ops.aot import CASES, assert_fits, assert_row_offsets_have_64_bits, cases, compile_kernel, facts_of

KERNELS = ["ppo", "cross_entropy"]
kernels = pytest.mark.parametrize("kernel", KERNELS)


def compile_one(kernel: str, dtype: str, arch: int) -> dict[str, Any]:
    """With every option, as the launcher would for a large vocabulary of any size, on any strides."""
    from rlhf_fast.kernels import logits_ppo_loss as module

    floats = ("old_logprobs", "advantages", "weights", "ref_logprobs", "num_tokens", "found")
    pointers = dict.fromkeys(floats, "*fp32") | {"ids": "*i64", "mask": "*i1", "logits": f"*{dtype}"}
    integers = dict.fromkeys(("rows", "offset", "inner", "outer_stride", "inner_stride", "vocabulary"), "i32")
    numbers = dict.fromkeys(("scale", "clip_low", "clip_high", "dual_clip", "kl_coef", "entropy_coef"), "fp32")
    constants = {"DUAL_CLIP": True, "KL": 3, "THREADS": 1024, "VECTOR": 8 if dtype == "bf16" else 4}
    options = {"num_warps": 8, "enable_fp_fusion": True}
    function = getattr(module, f"_{kernel}_kernel")
    return compile_kernel(function, arch, {**pointers, **integers, **numbers}, constants, options)


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    return facts_of("tests.ops.test_logits_ppo_loss_aot")


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
    assert_row_offsets_have_64_bits(compiled[f"{kernel} {dtype} {arch}"])


if __name__ == "__main__":
    print(json.dumps({f"{k} {d} {a}": compile_one(k, d, a) for k in KERNELS for d, a in CASES}))
