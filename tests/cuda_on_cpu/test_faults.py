"""What the machine finds: kernels with one bug each (faulty.cu), and kernels without (correct.cu).

The table in docs/cuda_on_cpu.md says in words what is asserted here.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from .device import Device, KernelError

HERE = Path(__file__).parent
THREADS = 64
ORDERS = (0, 1, 6)

RIGHT = "right values, and no report"
WRONG = "wrong values"

# kernel: what is found in the builds plain, checker and asan, in at least one order. A report is a regular expression.
FAULTS = {
    "no_barrier_before_reading": (WRONG, "race|uninitialised: read at faulty.cu", WRONG),
    "no_barrier_before_overwriting": (WRONG, r"race on dynamic shared memory .*read at .*; written by thread", WRONG),
    "no_warp_barrier": (WRONG, "race|uninitialised", WRONG),
    "warp_barrier_of_half_a_warp": (WRONG, "race|uninitialised", WRONG),
    "shuffle_as_a_barrier": (RIGHT, r"race on dynamic shared memory", RIGHT),
    "plain_increment": (RIGHT, r"race on dynamic shared memory \(256 bytes\), offset 0", RIGHT),
    "no_barrier_before_atomic": (WRONG, r"uninitialised: atomic operation at faulty.cu", WRONG),
    "two_blocks_one_place": (RIGHT, r"race on a buffer .*written by thread \d+ of another block", RIGHT),
    "last_block_without_fence": (RIGHT, r"race on a buffer .*written by thread 0 of another block", RIGHT),
    "last_block_without_fence_before_reading": (RIGHT, r"race on a buffer .*written by thread 0 of another", RIGHT),
    "last_block_of_another_counter": (WRONG, r"race on a buffer .*written by thread 0 of another block", WRONG),
    "unwritten_dynamic_shared": (WRONG, r"thread \(40, 0, 0\): uninitialised: read", WRONG),
    "unwritten_static_shared": (WRONG, r"thread \(40, 0, 0\): uninitialised: read", RIGHT),
    "shared_of_the_block_before": (WRONG, r"block \(1, 0, 0\), .*: uninitialised: read", RIGHT),
    "unwritten_buffer": (RIGHT, r"uninitialised: read at faulty.cu:\d+ of a buffer", RIGHT),
    "copy_without_wait": (WRONG, r"asynchronous copy: read at .* copy of thread \d+ .* under way", WRONG),
    "copy_waits_for_one_too_few": (WRONG, r"asynchronous copy: read", WRONG),
    "copy_without_barrier": (WRONG, r"uninitialised|race|asynchronous copy", WRONG),
    "copy_onto_what_others_read": (WRONG, r"race|asynchronous copy", WRONG),
    "copy_left_behind": (r"returned with 1 asynchronous copies not waited for",) * 3,
    "copy_from_an_odd_address": (r"misaligned: an asynchronous copy's source at faulty.cu",) * 3,
    "beyond_dynamic_shared": (r"out of bounds: offset 256 of 256 bytes of dynamic shared memory, at faulty.cu",) * 3,
    "beyond_static_shared": (RIGHT, RIGHT, r"undefined behaviour at faulty.cu"),
    "reads_beyond_a_buffer": (r"out of bounds: .*offset 256",) * 3,
    "writes_before_a_buffer": (
        r"out of bounds: wrote at offset -4",
        r"write of 4 bytes at faulty.cu",
        "out of bounds: WRITE of size 4, offset -4 .* at faulty.cu",
    ),
    "vector_beyond_a_ragged_buffer": (
        RIGHT,
        r"out of bounds: read .* offset 244",
        r"READ of size .*offset 244.* at faulty.cu",
    ),
    "misaligned_vector": (r"misaligned: load16 at faulty.cu",) * 3,
    "misaligned_float4": (RIGHT, RIGHT, r"undefined behaviour at faulty.cu"),
    "beyond_a_local_array": (RIGHT, RIGHT, r"undefined behaviour at faulty.cu"),
    "deep_recursion": (r"a thread's stack of \d+ bytes is full",) * 3,
    "division_by_zero": (r"integer division by zero at faulty.cu",) * 3,
    "barrier_in_both_branches": (r"divergent barrier: thread 0 is in __syncthreads at faulty.cu:\d+, thread 32",) * 3,
    "barrier_for_some": (r"deadlock(.|\n)*40 threads \(0 to 39\) wait in __syncthreads at faulty.cu",) * 3,
    "return_before_a_barrier": (r"reached by 51 of 64 threads: the others have returned",) * 3,
    "mask_without_the_caller": (r"lane 31 calls with mask 7fffffff, which does not name it",) * 3,
    "lane_outside_the_mask": (r"lane 0 reads lane 20, which is not in mask 0000ffff",) * 3,
    "shuffle_in_a_branch": (r"deadlock(.|\n)*__shfl_xor_sync at faulty.cu:\d+ for lanes 0xffff0000",) * 3,
    "lanes_in_different_shuffles": (r"meet in different calls: __shfl_xor_sync at faulty.cu",) * 3,
    "shuffle_with_lanes_that_returned": (r"deadlock|names lanes \w+, which have returned",) * 3,
    "matrix_product_by_half_a_warp": (r"deadlock(.|\n)*mma at faulty.cu",) * 3,
    "waits_for_another_block": (r"still runs after 0.2 s, at faulty.cu:\d+: a loop without end",) * 3,
}


def kernels_in(file: str) -> list[str]:
    return re.findall(r"^KERNEL\((\w+)\)", (HERE / file).read_text(), re.MULTILINE)


def outcome(build: str, order: int, file: str, kernel: str) -> str:
    """The report, or RIGHT or WRONG."""
    device = Device(build, order)
    device.limit(0.2 if kernel == "waits_for_another_block" else 10)
    out, scratch = device.empty(THREADS), device.empty(THREADS)
    x = device.tensor(torch.arange(61 if kernel == "vector_beyond_a_ragged_buffer" else THREADS, dtype=torch.float32))
    counter = device.tensor(torch.zeros(2, dtype=torch.int32))
    blocks = 2 if "block" in kernel else 1
    report = ""
    try:
        getattr(device.load(HERE / file), f"run_{kernel}")(out, x, scratch, counter, blocks)
    except KernelError as error:
        report = str(error)
    right = torch.equal(out, torch.arange(THREADS, dtype=torch.float32))
    device.close()
    assert not report or report.startswith(kernel)
    return report or (RIGHT if right else WRONG)


def test_every_faulty_kernel_is_in_the_table() -> None:
    assert list(FAULTS) == kernels_in("faulty.cu")


@pytest.mark.parametrize("kernel", FAULTS)
@pytest.mark.parametrize(("build", "column"), [("plain", 0), ("checker", 1), ("asan", 2)])
def test_fault(build: str, column: int, kernel: str) -> None:
    expected = FAULTS[kernel][column]
    outcomes = [outcome(build, order, "faulty.cu", kernel) for order in ORDERS]
    if expected == RIGHT:
        assert outcomes == [RIGHT] * len(ORDERS)
    elif expected == WRONG:
        assert WRONG in outcomes
        assert set(outcomes) <= {RIGHT, WRONG}
    else:
        assert any(re.search(expected, text) for text in outcomes), outcomes


@pytest.mark.parametrize("kernel", kernels_in("correct.cu"))
@pytest.mark.parametrize("build", ["plain", "checker", "asan"])
def test_no_false_alarm(build: str, kernel: str) -> None:
    for order in (0, 1, 6, 7, 8, 9):
        assert outcome(build, order, "correct.cu", kernel) == RIGHT, order
