"""value_loss against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from tests.ops.op_cases import Normals, assert_zero_outside, close, masks, poison, seeds


def by_definition(
    v: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float | None, n: float
) -> tuple[float, float]:
    loss = clipped_tokens = 0.0
    for at in mask.nonzero().tolist():
        value, before, target = (float(x[tuple(at)]) for x in (v, old, returns))
        error = (value - target) ** 2
        if clip is None:
            loss += 0.5 * error
            continue
        clipped_error = (max(before - clip, min(before + clip, value)) - target) ** 2
        loss += 0.5 * max(error, clipped_error)
        clipped_tokens += clipped_error > error
    return loss / n, clipped_tokens / n


@settings(max_examples=80, deadline=None)
@given(masks(), seeds, st.sampled_from([None, 0.0, 0.2, 5.0]), st.sampled_from(["none", "int", "tensor"]))
def test_definition(mask: Tensor, seed: int, clip: float | None, divisor: str) -> None:
    normal = Normals(seed)
    values, old, returns = normal(*mask.shape), normal(*mask.shape), normal(*mask.shape)
    num_tokens = {"none": None, "int": 17, "tensor": torch.tensor([17])}[divisor]
    n = max(int(mask.sum()), 1) if num_tokens is None else 17
    poisoned = [poison(x, mask) for x in (values, old, returns)]
    loss, stats = ops.value_loss(*poisoned, mask, cliprange_value=clip, num_tokens=num_tokens)
    expected_loss, expected_clipped = by_definition(values, old, returns, mask, clip, n)
    close(loss, expected_loss)
    close(stats["value_clip_fraction"], expected_clipped)
    assert loss.dim() == 0
    assert not stats["value_clip_fraction"].requires_grad


def test_gradient_to_values_only_and_none_outside_the_mask() -> None:
    normal, mask = Normals(0), torch.tensor([[True, False, True, True], [False, False, False, False]])
    values, old, returns = (normal(2, 4).requires_grad_() for _ in range(3))
    assert torch.autograd.gradcheck(lambda v: ops.value_loss(v, old, returns, mask).loss, [values])
    assert torch.autograd.gradcheck(
        lambda v: ops.value_loss(v, old, returns, mask, cliprange_value=None).loss, [values]
    )

    poisoned = [poison(x.detach(), mask).requires_grad_() for x in (values, old, returns)]
    ops.value_loss(*poisoned, mask).loss.backward()
    assert poisoned[0].grad is not None
    assert poisoned[0].grad.isfinite().all()
    assert_zero_outside(poisoned[0].grad, mask)
    assert poisoned[1].grad is None
    assert poisoned[2].grad is None


def test_micro_batches_add_up_to_the_batch() -> None:
    normal, mask = Normals(1), torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[2] = False  # one micro-batch has nothing
    values, old, returns = normal(6, 5).requires_grad_(), normal(6, 5), normal(6, 5)
    whole = ops.value_loss(values, old, returns, mask)
    whole_gradient = torch.autograd.grad(whole.loss, values)[0]

    n = mask.sum()
    splits = [slice(0, 2), slice(2, 3), slice(3, 6)]
    parts = [ops.value_loss(values[s], old[s], returns[s], mask[s], num_tokens=n) for s in splits]
    total = torch.stack([p.loss for p in parts]).sum()
    close(total, whole.loss)
    close(torch.autograd.grad(total, values)[0], whole_gradient)
    close(sum(p.stats["value_clip_fraction"] for p in parts), whole.stats["value_clip_fraction"])


@pytest.mark.parametrize("shape", [(3,), (0, 4), (2, 0), (2, 1)])
def test_any_shape_and_empty(shape: tuple[int, ...]) -> None:
    ones = torch.ones(shape)
    loss, _ = ops.value_loss(3 * ones, 3 * ones, ones, torch.ones(shape, dtype=torch.bool))
    assert loss.dtype == torch.float32
    assert float(loss) == (2.0 if ones.numel() else 0.0)


def test_half_precision_is_computed_in_fp32() -> None:
    normal, mask = Normals(2, torch.bfloat16), torch.ones(8, 64, dtype=torch.bool)
    inputs = [normal(8, 64) for _ in range(3)]
    loss = ops.value_loss(*inputs, mask).loss
    assert loss.dtype == torch.float32
    close(loss.double(), ops.value_loss(*(x.double() for x in inputs), mask).loss, 1e-5)
