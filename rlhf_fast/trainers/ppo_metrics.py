"""What a PPO step is judged by; means are over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.distributed import World, all_reduce_max, all_reduce_sum
from rlhf_fast.trainers.experience import Scored
from rlhf_fast.trainers.run import Metrics


def experience_metrics(
    scored: Scored,
    scores: Tensor,
    kl: Tensor | None,
    logprobs: Tensor,
    values: Tensor,
    returns: Tensor,
    rewards: Tensor,
    world: World,
) -> Metrics:
    """One rollout's metrics by TRL's names. scores [B]: as they went into the rewards, after penalty, normalising and
    clipping; kl [B]: nats a sequence; the others [B, T]."""
    mask = scored.rollout.mask
    means = scored.metrics(world)
    metrics = {
        "objective/scores": means["scores"],
        "objective/scores_std": means["scores_std"],
        "objective/rlhf_reward": row_mean(rewards.sum(-1), world),
        "objective/entropy": row_mean(-torch.where(mask, logprobs, 0.0).sum(-1), world),
        "val/mean": masked_mean(values, mask, world),
        "val/explained_var": explained_variance(values, returns, mask, world),
        "returns/mean": masked_mean(returns, mask, world),
        "completions/mean_length": means["mean_length"],
        "completions/eos_rate": means["eos_rate"],
        "completions/distinct_2": means["distinct_2"],
        "num_tokens": float(all_reduce_sum(mask.sum(), world)),
    }
    metrics |= {name: value for name, value in means.items() if name.startswith("rewards/")}
    if kl is not None:
        metrics["objective/kl"] = row_mean(kl, world)
        metrics["objective/non_score_reward"] = row_mean(rewards.sum(-1) - scores, world)
    return metrics


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor) -> Tensor | None:
    """Per-sequence sums [B] of log-prob minus reference log-prob, in nats (k1)."""
    if ref_logprobs is None:
        return None
    return torch.where(mask, logprobs - ref_logprobs, 0.0).sum(-1)


def row_mean(x: Tensor, world: World) -> float:
    """Mean of x [B] over the rows of all ranks."""
    return masked_mean(x, torch.ones_like(x, dtype=torch.bool), world)


def masked_mean(x: Tensor, mask: Tensor, world: World) -> float:
    """Mean over the masked tokens of all ranks."""
    sums = torch.stack([torch.where(mask, x, 0.0).double().sum(), mask.double().sum()])
    total, count = all_reduce_sum(sums, world).tolist()
    return total / max(count, 1.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, world: World) -> float:
    """1 - Var[returns - values] / Var[returns]: 1 is a perfect critic, 0 one no better than a constant."""

    def variance(x: Tensor) -> float:
        mean = masked_mean(x, mask, world)
        return masked_mean((x - mean).square(), mask, world)

    return 1.0 - variance(returns - values) / max(variance(returns), 1e-12)


def summed(shares: list[dict[str, Tensor]], world: World) -> Metrics:
    """Statistics of a whole step from those of its micro-batches on all ranks: sums (of names in _max: maxima)."""
    metrics = {}
    for name in shares[0]:
        values = torch.stack([share[name].double() for share in shares])
        if name.endswith("_max"):
            metrics[name] = float(all_reduce_max(values.max(), world))
        else:
            metrics[name] = float(all_reduce_sum(values.sum(), world))
    return metrics


class MeanMetrics:
    """Means (of names in _max: maxima) over the optimiser steps of one rollout."""

    def __init__(self) -> None:
        self.count = 0
        self._values: dict[str, list[float]] = {}

    def add(self, metrics: Metrics) -> None:
        """Take in one optimiser step's."""
        self.count += 1
        for name, value in metrics.items():
            self._values.setdefault(name, []).append(value)

    def means(self) -> Metrics:
        """One number a name."""
        return {
            name: max(values) if name.endswith("_max") else sum(values) / len(values)
            for name, values in self._values.items()
        }
