"""A small case for each .cu file, for tests that run kernels many times: it passes all barriers of its kernels.

A case is a test of the kernel's own, which compares with a reference, on one small shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.cuda import test_attention, test_gated_mlp, test_linear, test_norm, test_rope_append, test_sample
from tests.cuda_on_cpu.device import Device

CASES: dict[str, tuple[Callable[[Device], None], ...]] = {
    "attention": (
        lambda device: test_attention.test_several_tokens_of_a_sequence(device, torch.float32),
        lambda device: test_attention.test_a_split_of_several_tiles(device, torch.float32),
    ),
    "gated_mlp": (lambda device: test_gated_mlp.test_shapes(device, (3, 264, 40), torch.bfloat16),),
    "linear": (lambda device: test_linear.test_the_product(device, (3, 1033, 3), False, torch.bfloat16),),
    "norm": (lambda device: test_norm.test_rows_longer_than_the_block(device, torch.float32),),
    "rope_append": (
        lambda device: test_rope_append.test_heads_that_are_normed(device, torch.float32, "rms"),
        lambda device: test_rope_append.test_partial_interleaved_and_scaled(device, torch.float32),
    ),
    "sample": (
        lambda device: test_sample.test_a_row_alone_has_the_bits_that_it_has_among_others(device, {"top_p": 0.9}),
        lambda device: test_sample.test_the_inverse_of_the_cumulative_distribution_to_the_last_token(device, 257),
    ),
}
