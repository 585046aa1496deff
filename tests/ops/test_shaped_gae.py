"""shaped_gae against its parts written as loops: KL a token, the score on the last one, then gae."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops.shaped_gae import _warn_biased
from tests.ops.op_cases import Normals, assert_zero_outside, close, masks, poison, seeds

KL = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}


def shaped_rewards(
    scores: Tensor, d: Tensor, mask: Tensor, kl_coef: float, estimator: str, clip: float | None
) -> Tensor:
    rewards = torch.zeros(mask.shape, dtype=torch.float64)
    for row in range(mask.shape[0]):
        tokens = mask[row].nonzero()[:, 0].tolist()
        for t in tokens:
            rewards[row, t] = -kl_coef * KL[estimator](float(d[row, t]))
        if tokens:
            score = float(scores[row])
            rewards[row, tokens[-1]] += score if clip is None else max(-clip, min(clip, score))
    return rewards


@pytest.mark.filterwarnings("ignore:kl_estimator")
@settings(max_examples=80, deadline=None)
@given(
    masks(),
    seeds,
    st.sampled_from(["k1", "k2", "k3"]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([None, 0.5]),
)
def test_definition(mask: Tensor, seed: int, estimator: str, kl_coef: float, clip: float | None) -> None:
    normal = Normals(seed)
    scores, last = normal(mask.shape[0]), normal(mask.shape[0])
    logprobs, ref, values = normal(*mask.shape), normal(*mask.shape), normal(*mask.shape)
    advantages, returns, rewards = ops.shaped_gae(
        torch.where(mask.any(1), scores, torch.nan),  # a completion without tokens has nothing to score
        poison(logprobs, mask),
        poison(ref, mask),
        poison(values, mask),
        mask,
        kl_coef=kl_coef,
        kl_estimator=estimator,
        gamma=0.9,
        lam=0.8,
        clip_score=clip,
        last_values=last,
    )
    expected = shaped_rewards(scores, logprobs - ref, mask, kl_coef, estimator, clip)
    close(rewards, expected)
    by_parts = ops.gae(expected, values, mask, gamma=0.9, lam=0.8, last_values=last)
    close(advantages, by_parts[0])
    close(returns, by_parts[1])
    for output in (advantages, returns, rewards):
        assert_zero_outside(output, mask)


def test_no_reference_at_kl_coef_0() -> None:
    normal = Normals(0)
    scores, logprobs, values, mask = normal(2), normal(2, 3), normal(2, 3), torch.ones(2, 3, dtype=torch.bool)
    _, _, rewards = ops.shaped_gae(scores, logprobs, None, values, mask, kl_coef=0.0)
    close(rewards, torch.stack([torch.zeros(2), torch.zeros(2), scores], dim=1))
    with pytest.raises(ValueError, match=r"kl_coef 0.1 needs ref_logprobs"):
        ops.shaped_gae(scores, logprobs, None, values, mask, kl_coef=0.1)


def test_gradients() -> None:
    normal, mask = Normals(3), torch.tensor([[True, False, True], [False, False, False], [True, True, False]])
    inputs = [normal(3), normal(3, 3), normal(3, 3), normal(3, 3)]

    def run(scores: Tensor, logprobs: Tensor, ref: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops.shaped_gae(scores, logprobs, ref, values, mask, kl_coef=0.1, gamma=0.9)

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs])


def test_far_apart_distributions_stay_finite() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    far = torch.tensor([[-200.0, -1.0]])
    _, _, rewards = ops.shaped_gae(
        torch.zeros(1), far, torch.zeros(1, 2), torch.zeros(1, 2), mask, kl_coef=1.0, kl_estimator="k3"
    )
    assert rewards.isfinite().all()
    assert rewards[0, 0] == pytest.approx(-(math.exp(20) - 21))


def test_k2_and_k3_in_the_reward_warn_once() -> None:
    x, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    _warn_biased.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for estimator in ("k1", "k3", "k3", "k2", "k2"):
            ops.shaped_gae(torch.zeros(1), x, x, x, mask, kl_coef=0.1, kl_estimator=estimator)
    said = [str(w.message) for w in caught]
    assert len(said) == 2
    assert "'k3' in the reward" in said[0]
    assert "'k2' in the reward" in said[1]
    assert all(w.filename == __file__ for w in caught)  # blames the caller's line
