"""ppo_loss against a loop over tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from tests.ops.op_cases import Normals, assert_zero_outside, close, masks, poison, seeds

KL = {"k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}


def by_definition(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    n: float,
    *,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = None,
    weights: Tensor | None = None,
    ref: Tensor | None = None,
    kl_coef: float = 0.0,
    estimator: str = "k2",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> dict[str, float]:
    total = {"loss": 0.0, "approx_kl": 0.0, "clip_fraction": 0.0, "ratio_max": 0.0, "entropy": 0.0}
    for at in map(tuple, mask.nonzero().tolist()):
        a, log_ratio = float(advantages[at]), float(logprobs[at] - old[at])
        ratio = math.exp(log_ratio)
        unclipped, clipped = -a * ratio, -a * max(1 - low, min(1 + high, ratio))
        loss = max(unclipped, clipped)
        if dual is not None and a < 0:
            loss = min(loss, -dual * a)
        if ref is not None:
            loss += kl_coef * KL[estimator](float(logprobs[at] - ref[at]))
        if entropy is not None:
            loss -= entropy_coef * float(entropy[at])
            total["entropy"] += float(entropy[at]) / n
        weight = 1.0 if weights is None else float(weights.expand(mask.shape)[at])
        total["loss"] += weight * loss / n
        total["approx_kl"] += 0.5 * log_ratio**2 / n
        total["clip_fraction"] += (clipped > unclipped) / n
        total["ratio_max"] = max(total["ratio_max"], ratio)
    return total


@settings(max_examples=120, deadline=None)
@given(
    mask=masks(),
    seed=seeds,
    low=st.sampled_from([0.0, 0.2]),
    high=st.sampled_from([None, 0.28]),
    dual=st.sampled_from([None, 1.5]),
    weights=st.sampled_from(["none", "row", "token"]),
    estimator=st.sampled_from([None, "k2", "k3"]),
    entropy_coef=st.sampled_from([0.0, 0.01]),
    num_tokens=st.sampled_from([None, 23]),
)
def test_definition(
    mask: Tensor,
    seed: int,
    low: float,
    high: float | None,
    dual: float | None,
    weights: str,
    estimator: str | None,
    entropy_coef: float,
    num_tokens: int | None,
) -> None:
    normal = Normals(seed)
    logprobs, old, advantages, ref, entropy = (normal(*mask.shape) for _ in range(5))
    w = {"none": None, "row": normal(len(mask), 1), "token": normal(*mask.shape)}[weights]
    given_ref = ref if estimator else None
    n = num_tokens or max(int(mask.sum()), 1)
    found = ops.ppo_loss(
        poison(logprobs, mask),
        poison(old, mask),
        poison(advantages, mask),
        mask,
        cliprange=low,
        cliprange_high=high,
        dual_clip=dual,
        weights=poison(w, mask) if weights == "token" and w is not None else w,
        ref_logprobs=None if given_ref is None else poison(given_ref, mask),
        kl_coef=0.3 if estimator else 0.0,
        kl_estimator=estimator or "k2",
        entropy=poison(entropy, mask),
        entropy_coef=entropy_coef,
        num_tokens=num_tokens,
    )
    expected = by_definition(
        logprobs,
        old,
        advantages,
        mask,
        n,
        low=low,
        high=low if high is None else high,
        dual=dual,
        weights=w,
        ref=given_ref,
        kl_coef=0.3,
        estimator=estimator or "k2",
        entropy=entropy,
        entropy_coef=entropy_coef,
    )
    close(found.policy_loss, expected.pop("loss"))
    assert found.value_loss is None
    assert set(found.stats) == set(expected)
    for name, value in expected.items():
        close(found.stats[name], value)
        assert not found.stats[name].requires_grad


def test_without_entropy_there_is_no_such_statistic() -> None:
    x, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    assert set(ops.ppo_loss(x, x, x, mask).stats) == {"approx_kl", "clip_fraction", "ratio_max"}


def everything(normal: Normals, mask: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """Differentiable arguments (logprobs, entropy, values) and constants for all that ppo_loss can do."""
    size = mask.shape
    differentiable = [normal(*size), normal(*size), normal(*size)]
    constants = {
        "old_logprobs": differentiable[0] + 0.3 * normal(*size),
        "advantages": normal(*size),
        "weights": normal(*size),
        "ref_logprobs": normal(*size),
        "old_values": differentiable[2] + 0.3 * normal(*size),
        "returns": normal(*size),
    }
    return differentiable, constants


OPTIONS = {"kl_coef": 0.3, "kl_estimator": "k3", "entropy_coef": 0.1, "dual_clip": 1.5, "cliprange_high": 0.28}


@settings(max_examples=20, deadline=None)
@given(masks(3, 4), seeds)
def test_gradients(mask: Tensor, seed: int) -> None:
    inputs, constants = everything(Normals(seed), mask)

    def run(logprobs: Tensor, entropy: Tensor, values: Tensor, constants: dict[str, Tensor]) -> Tensor:
        result = ops.ppo_loss(logprobs=logprobs, entropy=entropy, values=values, mask=mask, **constants, **OPTIONS)
        assert result.value_loss is not None
        return result.policy_loss + 0.5 * result.value_loss

    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: run(*x, constants), leaves)
    clean = torch.autograd.grad(run(*leaves, constants), leaves)

    poisoned = [poison(x.detach(), mask).requires_grad_() for x in inputs]
    poisoned_constants = {name: poison(x, mask).requires_grad_() for name, x in constants.items()}
    run(*poisoned, poisoned_constants).backward()
    for leaf, gradient in zip(poisoned, clean, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, gradient)
        assert_zero_outside(leaf.grad, mask)
    assert all(x.grad is None for x in poisoned_constants.values())  # constants: nothing flows back


def test_at_the_old_policy_the_gradient_is_the_policy_gradient() -> None:
    normal, mask = Normals(1), torch.tensor([[True, True, False], [True, False, False]])
    logprobs, advantages = normal(2, 3).requires_grad_(), normal(2, 3)
    loss, _, stats = ops.ppo_loss(logprobs, logprobs.detach(), advantages, mask)
    loss.backward()
    assert logprobs.grad is not None
    close(logprobs.grad, torch.where(mask, -advantages / 3, 0))
    assert float(stats["ratio_max"]) == 1.0
    assert float(stats["approx_kl"]) == 0.0
    assert float(stats["clip_fraction"]) == 0.0


@pytest.mark.parametrize(("advantage", "log_ratio"), [(1.0, 0.5), (-1.0, -0.5)])
def test_nothing_pulls_a_token_further_out_of_the_clip_range(advantage: float, log_ratio: float) -> None:
    logprobs, mask = torch.tensor([[log_ratio]], requires_grad=True), torch.ones(1, 1, dtype=torch.bool)
    loss = ops.ppo_loss(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), mask).policy_loss
    loss.backward()
    assert logprobs.grad is not None
    assert float(logprobs.grad) == 0.0
    # ... but back into it, yes:
    logprobs.grad = None
    ops.ppo_loss(logprobs, torch.zeros(1, 1), torch.tensor([[-advantage]]), mask).policy_loss.backward()
    assert float(logprobs.grad) == pytest.approx(advantage * math.exp(log_ratio))


def test_extreme_ratios_stay_finite() -> None:
    logprobs = torch.tensor([[-500.0, 0.0]], requires_grad=True)
    old, mask = torch.tensor([[0.0, -500.0]]), torch.ones(1, 2, dtype=torch.bool)
    loss, _, stats = ops.ppo_loss(logprobs, old, torch.tensor([[1.0, -1.0]]), mask)
    loss.backward()
    assert loss.isfinite()
    assert float(stats["ratio_max"]) == pytest.approx(math.exp(20))
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()


def test_nan_under_the_mask_shows() -> None:
    """The trainer drops such a batch, so that it must not be hidden by a maximum or a clamp."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    logprobs = torch.tensor([[torch.nan, -1.0]])
    loss, _, stats = ops.ppo_loss(logprobs, torch.zeros(1, 2), torch.ones(1, 2), mask, dual_clip=2.0)
    assert loss.isnan()
    assert stats["ratio_max"].isnan()
    assert ops.ppo_loss(torch.zeros(1, 2), torch.zeros(1, 2), logprobs, mask, dual_clip=2.0).policy_loss.isnan()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_add_up_to_the_batch(as_tensor: bool) -> None:
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[2] = False  # one micro-batch has nothing
    (logprobs, entropy, values), constants = everything(Normals(2), mask)
    logprobs.requires_grad_()

    def run(rows: slice, num_tokens: int | Tensor | None) -> ops.PPOLoss:
        return ops.ppo_loss(
            logprobs=logprobs[rows],
            entropy=entropy[rows],
            values=values[rows],
            mask=mask[rows],
            num_tokens=num_tokens,
            **{name: x[rows] for name, x in constants.items()},
            **OPTIONS,
        )

    whole = run(slice(None), None)
    n = mask.sum()
    parts = [run(s, n if as_tensor else int(n)) for s in (slice(0, 2), slice(2, 3), slice(3, 6))]
    total = torch.stack([p.policy_loss for p in parts]).sum()
    close(total, whole.policy_loss)
    close(torch.autograd.grad(total, logprobs)[0], torch.autograd.grad(whole.policy_loss, logprobs)[0])
    assert whole.value_loss is not None
    close(torch.stack([p.value_loss for p in parts if p.value_loss is not None]).sum(), whole.value_loss)
    assert set(whole.stats) == {"approx_kl", "clip_fraction", "ratio_max", "entropy", "value_clip_fraction"}
    for name, stat in whole.stats.items():
        each = torch.stack([p.stats[name] for p in parts])
        close(each.max() if name == "ratio_max" else each.sum(), stat)


def test_value_arguments_give_value_loss() -> None:
    mask = torch.tensor([[True, True, False], [True, False, True]])
    (logprobs, _, values), constants = everything(Normals(3), mask)
    old_values, returns = constants["old_values"], constants["returns"]
    found = ops.ppo_loss(
        logprobs,
        constants["old_logprobs"],
        constants["advantages"],
        mask,
        values=values,
        old_values=old_values,
        returns=returns,
        cliprange_value=0.1,
        num_tokens=9,
    )
    expected = ops.value_loss(values, old_values, returns, mask, cliprange_value=0.1, num_tokens=9)
    assert found.value_loss is not None
    assert torch.equal(found.value_loss, expected.loss)
    assert torch.equal(found.stats["value_clip_fraction"], expected.stats["value_clip_fraction"])


def test_other_methods_are_arguments() -> None:
    """GRPO's mean of sequence means, and GSPO's sequence ratio."""
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    (logprobs, _, _), constants = everything(Normals(4), mask)
    old, advantages = constants["old_logprobs"], constants["advantages"]
    lengths = mask.sum(1, keepdim=True)
    grpo = ops.ppo_loss(logprobs, old, advantages, mask, weights=1 / lengths.double(), num_tokens=2).policy_loss
    rows = zip(logprobs.split(1), old.split(1), advantages.split(1), mask.split(1), strict=True)
    close(grpo, sum(by_definition(*row, n=int(row[3].sum()))["loss"] for row in rows) / 2)

    def length_mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0).sum(1, keepdim=True) / lengths

    sequence_mask = mask.any(1, keepdim=True)
    gspo = ops.ppo_loss(length_mean(logprobs), length_mean(old), advantages[:, :1], sequence_mask, cliprange=4e-4)
    ratio = torch.exp(length_mean(logprobs - old))
    expected = torch.maximum(-advantages[:, :1] * ratio, -advantages[:, :1] * ratio.clamp(1 - 4e-4, 1 + 4e-4)).mean()
    close(gspo.policy_loss, expected)


@pytest.mark.parametrize("shape", [(5,), (0, 4), (2, 0), (2, 1)])
def test_any_shape_and_empty(shape: tuple[int, ...]) -> None:
    ones = torch.ones(shape)
    loss, _, stats = ops.ppo_loss(ones, ones, ones, torch.ones(shape, dtype=torch.bool), entropy=ones)
    assert loss.dtype == torch.float32
    assert float(loss) == (-1.0 if ones.numel() else 0.0)
    assert float(stats["ratio_max"]) == (1.0 if ones.numel() else 0.0)


def test_half_precision_is_computed_in_fp32() -> None:
    mask = torch.ones(8, 64, dtype=torch.bool)
    (logprobs, entropy, _), constants = everything(Normals(5, torch.bfloat16), mask)
    del constants["old_values"], constants["returns"]
    loss = ops.ppo_loss(logprobs=logprobs, entropy=entropy, mask=mask, **constants, **OPTIONS).policy_loss
    exact = ops.ppo_loss(
        logprobs=logprobs.double(),
        entropy=entropy.double(),
        mask=mask,
        **{name: x.double() for name, x in constants.items()},
        **OPTIONS,
    ).policy_loss
    assert loss.dtype == torch.float32
    close(loss.double(), exact, 1e-5)
