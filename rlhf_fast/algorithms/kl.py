"""How far the policy is from the reference, and how hard it is pulled back."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.config import KLEstimator
from rlhf_fast.ops import _checks
from rlhf_fast.ops.reference._common import kl_terms

MAX_ERROR = 0.2  # one update changes the coefficient by at most this times completions / horizon


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator = "k1") -> Tensor:
    """Per-token estimates of KL(policy || reference) for tokens that the policy sampled (Schulman 2020).

        d = logprobs - ref_logprobs;  k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d with -d clamped to +-20

    k1's mean is the KL, but single terms may be negative; k3 has the same mean and is never negative; k2 is biased, and
    small in variance. Both arguments have one shape, which is the result's. There is no mask: padding is the caller's.

    Raises:
        TypeError: not floating point. ValueError: shapes that differ, an unknown estimator.
    """
    _checks.floating("kl_estimate", logprobs=logprobs, ref_logprobs=ref_logprobs)
    _checks.shape("kl_estimate", "ref_logprobs", ref_logprobs, logprobs.shape, "like logprobs")
    _checks.estimator("kl_estimate", estimator)
    return kl_terms(logprobs - ref_logprobs, estimator)


class FixedKLController:
    """A coefficient, `value`, that stays."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, kl: float, completions: int) -> None:
        """Nothing to do; here so that a loop need not ask which controller it has."""

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Keeps its own: what the resumed run's config says is what was asked for."""


class AdaptiveKLController:
    """A coefficient, `value`, that steers the KL to a target (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

        error  = clip(kl / target - 1, +-0.2)
        value *= 1 + error * completions / horizon

    Args:
        kl_coef: the coefficient at the start.
        target: the KL of a whole completion (summed over its tokens, mean over completions), in nats.
        horizon: completions over which the controller acts.

    Raises:
        TypeError, ValueError: something that is not a number above 0.
    """

    def __init__(self, kl_coef: float, target: float, horizon: int) -> None:
        _checks.number("AdaptiveKLController", "kl_coef", kl_coef, above=0.0)
        _checks.number("AdaptiveKLController", "target", target, above=0.0)
        _checks.number("AdaptiveKLController", "horizon", horizon, above=0.0)
        self.value = kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, completions: int) -> None:
        """Take in one step's mean KL a completion, and how many completions (over all ranks) it was measured on."""
        error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
        self.value *= 1 + error * completions / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]
