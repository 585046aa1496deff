"""The policy loss of tokens and its derivatives: what ppo_loss and logits_ppo_loss share on the GPU.

The twin of csrc/cpu/ppo_token.h, in float32, on scalars or blocks. Where max, min and clamp have no derivative it is
the one that PyTorch's autograd takes: at a tie each side gets half, and the ends of a clamp count as inside. A log-prob
of NaN has a derivative of NaN.
"""

# Triton reads the annotations of a kernel's arguments as their types, so they carry none.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import triton
import triton.language as tl

MAX_LOG_RATIO = tl.constexpr(20.0)


@triton.jit
def _clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _outside(x, low, high):
    return (x < low) | (x > high)  # NaN is not


@triton.jit
def _expm1_less_x(x):
    # exp(x) - 1 - x. Near 0 by its series, as the difference has no digits left there.
    series = 1.0 + x / 9.0
    series = 1.0 + x / 8.0 * series
    series = 1.0 + x / 7.0 * series
    series = 1.0 + x / 6.0 * series
    series = 1.0 + x / 5.0 * series
    series = 1.0 + x / 4.0 * series
    series = 1.0 + x / 3.0 * series
    return tl.where(tl.abs(x) < 0.5, x * x * 0.5 * series, tl.exp(x) - 1.0 - x)


@triton.jit
def ppo_token(
    logprob,
    old_logprob,
    advantage,
    weight,
    ref_logprob,
    entropy,
    clip_low,
    clip_high,
    dual_clip,
    kl_coef,
    entropy_coef,
    DUAL_CLIP: tl.constexpr,
    KL: tl.constexpr,  # 0: no KL in the loss; 2 and 3: k2 and k3
):
    """(loss, d loss / d logprob, d loss / d entropy, ratio, whether clipped, approx_kl), not yet divided."""
    difference = logprob - old_logprob
    log_ratio = _clamp(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = tl.exp(log_ratio)
    unclipped = -advantage * ratio
    clipped = -advantage * _clamp(ratio, clip_low, clip_high)

    from_clipped = tl.where(_outside(ratio, clip_low, clip_high), 0.0, unclipped)
    is_clipped = clipped > unclipped
    loss = tl.where(is_clipped, clipped, unclipped)
    dlogprob = tl.where(is_clipped, from_clipped, unclipped)
    dlogprob = tl.where(clipped == unclipped, 0.5 * (unclipped + from_clipped), dlogprob)
    if DUAL_CLIP:
        bound = -dual_clip * advantage
        dlogprob = tl.where((advantage < 0) & (loss > bound), 0.0, dlogprob)
        dlogprob = tl.where((advantage < 0) & (loss == bound), 0.5 * dlogprob, dlogprob)
        loss = tl.where((advantage < 0) & (loss > bound), bound, loss)
    dlogprob = tl.where(_outside(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO), 0.0, dlogprob)

    if KL == 2:
        d = logprob - ref_logprob
        loss += kl_coef * 0.5 * d * d
        dlogprob += kl_coef * d
    if KL == 3:
        d = logprob - ref_logprob
        x = _clamp(-d, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        rest = _expm1_less_x(x)
        loss += kl_coef * rest
        dlogprob -= tl.where(_outside(-d, -MAX_LOG_RATIO, MAX_LOG_RATIO), 0.0, kl_coef * (rest + x))
    loss -= entropy_coef * entropy
    approx_kl = 0.5 * log_ratio * log_ratio
    return weight * loss, weight * dlogprob, -weight * entropy_coef, ratio, is_clipped, approx_kl
