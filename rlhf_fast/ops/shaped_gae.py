"""KL-shaped rewards, score, and generalised advantage estimation in one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from rlhf_fast.config import KLEstimator
from rlhf_fast.ops import _checks, reference
from rlhf_fast.ops._dispatch import Backend, Implementation, choose_backend_without_gradient, load_compiled_ops


def shaped_gae(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kl_estimator: KLEstimator = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    clip_score: float | None = None,
    last_values: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """From the scores of whole completions to per-token rewards, advantages and returns (Ziegler et al. 2019).

        rewards_t = -kl_coef * kl_t,  plus clip(score, +-clip_score) on the row's last masked token
        kl_t: d = logprob - ref_logprob;  k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d with -d clamped to +-20

    and then `gae`. In a reward only k1 is unbiased: k2 and k3 warn, once a process.

    Args:
        scores: [B], one for each completion. A row without masked tokens has no token to carry its score.
        logprobs: [B, T], the sampling policy's.
        ref_logprobs: [B, T], the reference model's; may be None when kl_coef is 0.
        values: [B, T], value of the state before token t.
        mask: [B, T] bool, True for trained tokens; may have holes and empty rows.
        kl_coef: weight of the KL, at least 0.
        kl_estimator: "k1", "k2" or "k3".
        gamma, lam, last_values: as in `gae`.
        clip_score: scores are clipped to +- this; None: not at all.
        backend: see rlhf_fast.ops.

    Returns:
        (advantages, returns, rewards), all [B, T]: float64 if an input is, else float32; exactly 0 outside the mask.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number, no ref_logprobs though kl_coef is not 0, a
        backend that there is not.
    """
    _checks.mask("shaped_gae", mask, dims=2)
    _checks.per_row("shaped_gae", mask, scores=scores, last_values=last_values)
    _checks.per_token("shaped_gae", mask, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values)
    _checks.number("shaped_gae", "kl_coef", kl_coef, minimum=0.0)
    _checks.estimator("shaped_gae", kl_estimator)
    _checks.number("shaped_gae", "gamma", gamma, minimum=0.0, maximum=1.0)
    _checks.number("shaped_gae", "lam", lam, minimum=0.0, maximum=1.0)
    _checks.limit("shaped_gae", "clip_score", clip_score, above=0.0)
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"shaped_gae: kl_coef {kl_coef:g} needs ref_logprobs, which is None")
    if kl_coef and kl_estimator != "k1":
        _warn_biased(kl_estimator)
    implementation = choose_backend_without_gradient(
        "shaped_gae",
        backend,
        mask.device,
        scores=scores,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        last_values=last_values,
    )
    if implementation != "reference":
        return _compiled(implementation)(
            scores,
            logprobs,
            ref_logprobs,
            values,
            mask,
            kl_coef,
            get_args(KLEstimator).index(kl_estimator) + 1,
            gamma,
            lam,
            clip_score,
            last_values,
        )
    return reference.shaped_gae(
        scores,
        logprobs,
        ref_logprobs,
        values,
        mask,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        gamma=gamma,
        lam=lam,
        clip_score=clip_score,
        last_values=last_values,
    )


def _compiled(implementation: Implementation) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    if implementation == "cpp":
        load_compiled_ops()
        return torch.ops.rlhf_fast.shaped_gae
    from rlhf_fast.kernels import shaped_gae as kernel  # not at the top: a machine may have no Triton

    return kernel.shaped_gae


@functools.cache
def _warn_biased(kl_estimator: str) -> None:
    """Cached, and so said once a process."""
    warnings.warn(
        f"kl_estimator {kl_estimator!r} in the reward does not give the gradient of the KL; 'k1' does. "
        "k2 and k3 are meant for the loss.",
        UserWarning,
        stacklevel=3,
    )
