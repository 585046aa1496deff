"""gae against the definition, written as sums over each row's masked tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from tests.ops.op_cases import Normals, assert_zero_outside, close, masks, poison, seeds


def by_definition(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, last: Tensor) -> Tensor:
    """A_t = sum over k of (gamma * lam)^k * delta_{t+k}, on the row without its untrained tokens."""
    advantages = torch.zeros(mask.shape, dtype=torch.float64)
    for row in range(mask.shape[0]):
        tokens = mask[row].nonzero()[:, 0].tolist()
        value = [float(values[row, t]) for t in tokens] + [float(last[row])]
        delta = [float(rewards[row, t]) + gamma * value[i + 1] - value[i] for i, t in enumerate(tokens)]
        for i, t in enumerate(tokens):
            advantages[row, t] = sum((gamma * lam) ** k * d for k, d in enumerate(delta[i:]))
    return advantages


@settings(max_examples=80, deadline=None)
@given(masks(), seeds, st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([0.0, 0.95, 1.0]), st.booleans())
def test_definition(mask: Tensor, seed: int, gamma: float, lam: float, with_last: bool) -> None:
    normal = Normals(seed)
    rewards, values, last = normal(*mask.shape), normal(*mask.shape), normal(mask.shape[0])
    advantages, returns = ops.gae(
        poison(rewards, mask), poison(values, mask), mask, gamma=gamma, lam=lam, last_values=last if with_last else None
    )
    expected = by_definition(rewards, values, mask, gamma, lam, last if with_last else torch.zeros_like(last))
    close(advantages, expected)
    close(returns, torch.where(mask, expected + values, 0))
    assert_zero_outside(advantages, mask)
    assert_zero_outside(returns, mask)


def test_lambda_1_returns_are_the_discounted_rewards() -> None:
    rewards = torch.tensor([[1.0, 10.0, 100.0]], dtype=torch.float64)
    values = torch.tensor([[0.3, -0.7, 0.2]], dtype=torch.float64)
    _, returns = ops.gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.5, lam=1.0)
    close(returns, [[1 + 5 + 25, 10 + 50, 100]])


def test_a_hole_is_as_if_the_column_were_not_there() -> None:
    normal = Normals(0)
    rewards, values = normal(3, 6), normal(3, 6)
    mask = torch.tensor([[True, True, False, False, True, True]]).expand(3, 6)
    keep = mask[0]
    with_hole = ops.gae(rewards, values, mask, gamma=0.9)
    without = ops.gae(rewards[:, keep], values[:, keep], mask[:, keep], gamma=0.9)
    for a, b in zip(with_hole, without, strict=True):
        assert torch.equal(a[:, keep], b)


@settings(max_examples=20, deadline=None)
@given(masks(3, 5), seeds)
def test_gradients(mask: Tensor, seed: int) -> None:
    normal = Normals(seed)
    inputs = [normal(*mask.shape), normal(*mask.shape), normal(mask.shape[0])]

    def run(rewards: Tensor, values: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        return ops.gae(rewards, values, mask, gamma=0.9, lam=0.8, last_values=last)

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs])

    poisoned = [poison(inputs[0].detach(), mask).requires_grad_(), poison(inputs[1].detach(), mask).requires_grad_()]
    advantages, returns = run(*poisoned, inputs[2])
    for gradient in torch.autograd.grad((advantages * returns).sum(), poisoned):
        assert gradient.isfinite().all()
        assert_zero_outside(gradient, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    normal = Normals(1, dtype)
    rewards, values, mask = normal(2, 5), normal(2, 5), torch.ones(2, 5, dtype=torch.bool)
    advantages, returns = ops.gae(rewards, values, mask)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert advantages.dtype == returns.dtype == wanted
    exact, _ = ops.gae(rewards.double(), values.double(), mask)
    close(advantages.double(), exact, 1e-5)  # computed in fp32, not in half precision


def test_one_float64_argument_is_enough() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert ops.gae(torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 2), mask)[0].dtype == torch.float64


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 1)])
def test_empty_and_single_columns(shape: tuple[int, int]) -> None:
    zeros = torch.zeros(shape)
    advantages, returns = ops.gae(zeros + 2, zeros + 0.5, torch.ones(shape, dtype=torch.bool))
    assert torch.equal(advantages, zeros + 1.5)
    assert torch.equal(returns, zeros + 2)


def test_strides_do_not_matter() -> None:
    normal = Normals(2)
    rewards, values, mask = normal(6, 4), normal(6, 4), torch.rand(6, 4) > 0.3
    plain = ops.gae(rewards.T.contiguous(), values.T.contiguous(), mask.T.contiguous())
    strided = ops.gae(rewards.T, values.T, mask.T)
    assert torch.equal(plain[0], strided[0])
    assert torch.equal(plain[1], strided[1])
