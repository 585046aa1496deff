"""Advantage estimators and KL controllers: pure functions and small classes, nothing that knows a model."""

from rlhf_fast.algorithms import dschat
from rlhf_fast.algorithms.kl import AdaptiveKLController, FixedKLController, kl_estimate

__all__ = ["AdaptiveKLController", "FixedKLController", "dschat", "kl_estimate"]
