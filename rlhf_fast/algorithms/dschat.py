"""DeepSpeed-Chat's PPO arithmetic, for people who bring a run over from it (`semantics: dschat`).

It differs from rlhf_fast.ops's in what lies past the end of a completion (DeepSpeedExamples, applications/
DeepSpeed-Chat/dschat/rlhf/ppo_trainer.py). Let a row have n trained tokens in T response columns:

- The score, clipped to +-5, lands on column min(n, T - 1): one past the last trained token where the row has padding.
- Rewards and values are kept up to that column and zeroed beyond it; GAE then runs over all T columns as if none were
  masked. So the KL and the value at the first padding token count too.
- Losses divide by the mask sum of the micro-batch at hand, not of the whole step: rlhf_fast.ops.ppo_loss and value_loss
  with num_tokens=None (they leave out all padding, so that nothing of the above reaches them but through advantages and
  returns).
- Its constants: KL coefficient 0.1, gamma 1, lam 0.95, all clips 0.2, no whitening.

Holes in the mask are counted as DeepSpeed-Chat counts them: n is the number of True in the row, wherever they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import _checks

KL_COEF = 0.1
CLIP_SCORE = 5.0


def live_columns(mask: Tensor) -> Tensor:
    """The columns that advantages_and_returns reads: each row's first n + 1, n the number of trained tokens in it.

    A trainer that only computes log-probs and values of trained tokens must compute them at these columns too. The one
    extra needs no further input token: its state is that of the last trained token, its id is the padding id.

    Args:
        mask: [B, T] bool over response tokens, right-padded, True for trained tokens.

    Returns:
        [B, T] bool.
    """
    _checks.mask("live_columns", mask, dims=2)
    return torch.arange(mask.shape[1], device=mask.device) <= mask.sum(dim=1, keepdim=True)


def advantages_and_returns(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float = KL_COEF,
    clip_score: float | None = CLIP_SCORE,
    gamma: float = 1.0,
    lam: float = 0.95,
    backend: ops.Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """What rlhf_fast.ops.shaped_gae is by default, DeepSpeed-Chat's way; the arguments are the same.

    Args:
        scores: [B].
        logprobs, ref_logprobs, values: [B, T] over response tokens, right-padded, finite in live_columns(mask).
        mask: [B, T] bool, True for trained tokens.
        kl_coef, clip_score, gamma, lam, backend: as in shaped_gae, with DeepSpeed-Chat's constants as defaults.

    Returns:
        (advantages, returns, rewards), all [B, T], without gradients; 0 outside live_columns(mask), not outside mask.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number.
    """
    live = live_columns(mask)
    with torch.no_grad():
        # On the live columns, which have no holes, it is the common arithmetic: the last of them carries the score.
        return ops.shaped_gae(
            scores,
            logprobs,
            ref_logprobs,
            values,
            live,
            kl_coef=kl_coef,
            gamma=gamma,
            lam=lam,
            clip_score=clip_score,
            backend=backend,
        )


def losses(
    prompt_len: int,
    attention_mask: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    scores: Tensor,
    new_logprobs: Tensor,
    new_values: Tensor,
) -> dict[str, Tensor]:
    """One whole PPO update's numbers from DeepSpeed-Chat's own tensors, prompts and all.

    Args:
        prompt_len: P, columns of the padded prompts.
        attention_mask: [B, L], bool or 0 and 1, over prompt and response.
        logprobs, ref_logprobs: [B, L - 1]; column t is of token t + 1.
        values: [B, L - 1]; column t is of the state after token t.
        scores: [B].
        new_logprobs, new_values: [B, L - 1], with gradients if the losses are to have them.

    Returns:
        advantages and returns [B, L - P] (columns from P - 1 on), actor_loss and critic_loss (0-d), by DeepSpeed-Chat's
        constants.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape, prompt_len not from 1 to L - 1.
    """
    length = attention_mask.shape[-1]
    if attention_mask.dim() != 2:
        raise ValueError(f"losses: attention_mask must have shape [B, L]; got {list(attention_mask.shape)}")
    if not 1 <= prompt_len < length:
        raise ValueError(f"losses: prompt_len must be from 1 to {length - 1} (L - 1); got {prompt_len}")
    mask = attention_mask[:, 1:].bool()
    per_action = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values}
    per_action |= {"new_logprobs": new_logprobs, "new_values": new_values}
    _checks.per_token("losses", mask, **per_action)

    response = slice(prompt_len - 1, None)
    mask, logprobs, values = mask[:, response], logprobs[:, response], values[:, response]
    advantages, returns, _ = advantages_and_returns(scores, logprobs, ref_logprobs[:, response], values, mask)
    return {
        "advantages": advantages,
        "returns": returns,
        "actor_loss": ops.ppo_loss(new_logprobs[:, response], logprobs, advantages, mask).policy_loss,
        "critic_loss": ops.value_loss(new_values[:, response], values, returns, mask).loss,
    }
