"""DeepSpeed-Chat's arithmetic: the numbers that its own code gave, and its rules as loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.algorithms import dschat
from tests.ops.op_cases import Normals, close, masks, seeds


def rows(*numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# Two prompts of 3 columns (one left-padded) and responses of 2 and 4 tokens in 4 columns.
PROMPT_LEN = 3
ATTENTION_MASK = torch.tensor([[0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
LOGPROBS = rows([-1, -2, -0.5, -0.7, -3, -4], [-1, -1, -0.2, -0.9, -1.1, -0.3])
REF_LOGPROBS = rows([-1, -2, -0.6, -0.5, -2, -4], [-1, -1, -0.3, -0.8, -1.4, -0.1])
VALUES = rows([0.1, 0.2, 0.3, 0.4, 0.9, -0.5], [0, 0.1, 0.2, 0.1, 0.3, 0.5])
SCORES = torch.tensor([7.0, -1.5], dtype=torch.float64)
NEW_LOGPROBS = LOGPROBS + rows([0, 0, 0.3, -0.1, 0.5, 0], [0, 0, 0.05, -0.4, 0.1, 0.02])
NEW_VALUES = VALUES + rows([0, 0, 0.5, -0.1, 0.7, 0], [0, 0, -0.3, 0.1, 0.05, 0.4])
ROW_1 = [-1.4546775, -1.41545, -1.711, -1.98]  # the full row: no padding, no difference


def test_golden_dschat() -> None:
    found = dschat.losses(PROMPT_LEN, ATTENTION_MASK, LOGPROBS, REF_LOGPROBS, VALUES, SCORES, NEW_LOGPROBS, NEW_VALUES)
    assert list(found) == ["advantages", "returns", "actor_loss", "critic_loss"]
    close(found["advantages"], [[4.3745, 4.51, 4.2, 0], ROW_1])
    close(
        found["returns"], [[4.6745, 4.91, 5.1, 0], [a + v for a, v in zip(ROW_1, VALUES[1, 2:].tolist(), strict=True)]]
    )
    close(found["actor_loss"], -0.4596083751605389)
    close(found["critic_loss"], 4.276239631792188)


def test_golden_default() -> None:
    response = slice(PROMPT_LEN - 1, None)
    mask = ATTENTION_MASK[:, 1:].bool()[:, response]
    logprobs, ref, values = LOGPROBS[:, response], REF_LOGPROBS[:, response], VALUES[:, response]
    advantages, returns, _ = ops.shaped_gae(
        SCORES, logprobs, ref, values, mask, kl_coef=0.1, clip_score=5.0, gamma=1.0, lam=0.95
    )
    close(advantages, [[4.479, 4.62, 0, 0], ROW_1])
    close(returns[0], [4.779, 5.02, 0, 0])
    close(ops.ppo_loss(NEW_LOGPROBS[:, response], logprobs, advantages, mask).policy_loss, -0.4970970611578647)
    close(ops.value_loss(NEW_VALUES[:, response], values, returns, mask).loss, 4.43538052762552)


def by_definition(
    scores: Tensor,
    logprobs: Tensor,
    ref: Tensor,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Rewards end one past the last action, values are zeroed beyond it, GAE sees no mask."""
    advantages, returns = torch.zeros(mask.shape).double(), torch.zeros(mask.shape).double()
    for row in range(mask.shape[0]):
        columns = mask.shape[1]
        end = min(int(mask[row].sum()) + 1, columns)
        reward = [-kl_coef * float(logprobs[row, t] - ref[row, t]) if t < end else 0.0 for t in range(columns)]
        reward[end - 1] += max(-5.0, min(5.0, float(scores[row])))
        value = [float(values[row, t]) if t < end else 0.0 for t in range(columns)] + [0.0]
        after = 0.0
        for t in reversed(range(columns)):
            after = reward[t] + gamma * value[t + 1] - value[t] + gamma * lam * after
            advantages[row, t] = after
            returns[row, t] = after + value[t]
    return advantages, returns


@settings(max_examples=80, deadline=None)
@given(masks(), seeds)
def test_advantages_and_returns(mask: Tensor, seed: int) -> None:
    normal = Normals(seed)
    scores, logprobs, ref, values = 6 * normal(len(mask)), normal(*mask.shape), normal(*mask.shape), normal(*mask.shape)
    expected = by_definition(scores, logprobs, ref, values, mask, 0.3, 0.9, 0.8)
    live = dschat.live_columns(mask)
    assert live.sum(1).tolist() == [min(n + 1, mask.shape[1]) for n in mask.sum(1).tolist()]
    poisoned = [torch.where(live, x, torch.nan).requires_grad_() for x in (logprobs, ref, values)]
    advantages, returns, rewards = dschat.advantages_and_returns(
        scores, *poisoned, mask, kl_coef=0.3, gamma=0.9, lam=0.8
    )
    close(advantages, expected[0])
    close(returns, expected[1])
    assert not advantages.requires_grad
    assert not rewards.requires_grad
    close(rewards.sum(1), torch.where(live, -0.3 * (logprobs - ref), 0).sum(1) + scores.clamp(-5, 5))


def test_losses_give_gradients_under_the_mask_only() -> None:
    new_logprobs, new_values = NEW_LOGPROBS.clone().requires_grad_(), NEW_VALUES.clone().requires_grad_()
    found = dschat.losses(
        PROMPT_LEN, ATTENTION_MASK.bool(), LOGPROBS, REF_LOGPROBS, VALUES, SCORES, new_logprobs, new_values
    )
    (found["actor_loss"] + found["critic_loss"]).backward()
    trained = ATTENTION_MASK[:, 1:].bool()
    trained[:, : PROMPT_LEN - 1] = False
    for gradient in (new_logprobs.grad, new_values.grad):
        assert gradient is not None
        assert bool((gradient[~trained] == 0).all())
    assert new_logprobs.grad is not None
    assert bool((new_logprobs.grad[0, 2:4] != 0).any())


def test_wrong_arguments() -> None:
    def run(prompt_len: int = 3, mask: Tensor = ATTENTION_MASK, values: Tensor = VALUES) -> None:
        dschat.losses(prompt_len, mask, LOGPROBS, REF_LOGPROBS, values, SCORES, NEW_LOGPROBS, NEW_VALUES)

    for bad in (0, 7):
        with pytest.raises(ValueError, match=rf"prompt_len must be from 1 to 6 \(L - 1\); got {bad}"):
            run(prompt_len=bad)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[B, L\]; got \[7\]"):
        run(mask=ATTENTION_MASK[0])
    with pytest.raises(ValueError, match=r"values must have shape \[2, 6\], like mask; got \[2, 5\]"):
        run(values=VALUES[:, 1:])
