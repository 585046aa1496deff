"""What one rollout is worth: the tensors that the PPO update learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from transformers import PreTrainedTokenizerBase

from rlhf_fast.config import PPOConfig
from rlhf_fast.data import PromptExample
from rlhf_fast.distributed import World, all_reduce_max, all_reduce_sum
from rlhf_fast.generation import Generator, Rollout, SamplingParams
from rlhf_fast.ops import masked_whiten
from rlhf_fast.rewards import Reward, RewardScores
from rlhf_fast.tracking import distinct_n


@dataclass
class Scored:
    """Completions of some prompts and what the rewards say of them; one entry a completion, prompt-major."""

    prompts: list[PromptExample]
    rollout: Rollout
    completions: list[str]
    rewards: RewardScores

    def rows(self, kl: Tensor | None, at_most: int | None = None) -> list[dict[str, object]]:
        """Rows for samples.jsonl; kl [B]: nats a sequence from the reference."""
        return [
            {
                "prompt": self.prompts[i].prompt,
                "completion": self.completions[i],
                "score": float(self.rewards.total[i]),
                "rewards": {name: float(part[i]) for name, part in self.rewards.parts.items()},
                "finish_reason": "stop" if self.rollout.finished[i] else "length",
                "tokens": int(self.rollout.lengths[i]),
                **({} if kl is None else {"kl": float(kl[i])}),
            }
            for i in range(len(self.completions))[:at_most]
        ]

    def metrics(self, world: World) -> dict[str, float]:
        """Means over the completions of all ranks."""
        total = self.rewards.total.double()
        sums = {
            "count": torch.tensor(float(len(self.completions))),
            "scores": total.sum(),
            "squares": total.square().sum(),
            "mean_length": self.rollout.lengths.double().sum(),
            "eos_rate": self.rollout.finished.double().sum(),
            **{f"rewards/{name}": part.double().sum() for name, part in self.rewards.parts.items()},
        }
        reduced = all_reduce_sum(torch.stack([x.to(world.device, torch.float64) for x in sums.values()]), world)
        means = dict(zip(sums, (reduced / reduced[0]).tolist(), strict=True))
        variance = max(means.pop("squares") - means["scores"] ** 2, 0.0)
        means.pop("count")
        means["scores_std"] = variance**0.5
        means["scores_stderr"] = (variance / float(reduced[0])) ** 0.5
        means["distinct_2"] = distinct_n(self.completions, 2)  # of this rank's completions: it does not add up
        return means


def sample(
    generator: Generator, prompts: Sequence[PromptExample], config: PPOConfig, *, step: int, rank: int
) -> Rollout:
    """Complete each prompt num_generations times; step 0 is evaluation: once, always with the same random numbers."""
    params = SamplingParams(
        n=config.num_generations if step else 1,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        max_tokens=config.max_new_tokens,
        min_tokens=config.min_new_tokens,
        stop_token_ids=config.stop_token_ids,
    )
    seeds = [mix_seed(config.seed, step, rank, i) for i in range(len(prompts))]
    return generator.rollout([prompt.prompt_ids for prompt in prompts], params, seeds=seeds)


def score(
    reward: Reward, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[PromptExample], rollout: Rollout
) -> Scored:
    """Ask the rewards for one number a completion. Raises RewardError."""
    samples = len(rollout.prompt_ids) // max(len(prompts), 1)
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    completions = [
        tokenizer.decode(tokens[:length], skip_special_tokens=True)
        for tokens, length in zip(rollout.tokens.tolist(), rollout.lengths.tolist(), strict=True)
    ]
    names = sorted({name for prompt in repeated for name in prompt.columns})
    columns = {name: [prompt.columns.get(name) for prompt in repeated] for name in names}
    scores = reward.score([prompt.prompt for prompt in repeated], completions, **columns)
    return Scored(repeated, rollout, completions, scores)


@dataclass
class Experience:
    """Per-token tensors [B, T] over responses, right-padded and zero outside `mask`, and the rollout they belong to."""

    rollout: Rollout
    mask: Tensor
    old_logprobs: Tensor  # of the policy that sampled
    ref_logprobs: Tensor | None
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def select(self, rows: Sequence[int]) -> Experience:
        """The experience of some rows, in that order."""
        index = torch.as_tensor(list(rows), dtype=torch.long, device=self.mask.device)
        chosen = {}
        for field in fields(self):
            value = getattr(self, field.name)
            chosen[field.name] = value.select(rows) if isinstance(value, Rollout) else value
            if isinstance(value, Tensor):
                chosen[field.name] = value[index]
        return Experience(**chosen)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row's prompt and response together."""
        responses = self.rollout.lengths.tolist()
        return [len(prompt) + n for prompt, n in zip(self.rollout.prompt_ids, responses, strict=True)]


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor) -> Tensor | None:
    """Per-sequence sums [B] of log-prob minus reference log-prob, in nats (k1)."""
    if ref_logprobs is None:
        return None
    return torch.where(mask, logprobs - ref_logprobs, 0.0).sum(-1)


def masked_mean(x: Tensor, mask: Tensor, world: World) -> float:
    """Mean over the masked tokens of all ranks."""
    sums = torch.stack([torch.where(mask, x, 0.0).double().sum(), mask.double().sum()])
    total, count = all_reduce_sum(sums, world).tolist()
    return total / max(count, 1.0)


def masked_max(x: Tensor, mask: Tensor, world: World) -> float:
    """Largest value under the mask on any rank."""
    return float(all_reduce_max(torch.where(mask, x, 0.0).max() if mask.any() else 0.0, world))


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, world: World) -> float:
    """1 - Var[returns - values] / Var[returns]: 1 is a perfect critic, 0 one no better than a constant."""

    def variance(x: Tensor) -> float:
        mean = masked_mean(x, mask, world)
        return masked_mean((x - mean).square(), mask, world)

    return 1.0 - variance(returns - values) / max(variance(returns), 1e-12)


def normalized(scores: Tensor, world: World) -> Tensor:
    """Scores [B] to mean 0 and deviation 1 over all ranks."""
    group = torch.distributed.group.WORLD if world.world_size > 1 else None
    return masked_whiten(scores, torch.ones_like(scores, dtype=torch.bool), group=group)


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers: the same for the same numbers, unrelated for any others."""
    seed = 0
    for part in parts:  # SplitMix64 (Steele, Lea and Flood 2014)
        seed = (seed + part + 0x9E3779B97F4A7C15) % 2**64
        seed = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        seed = (seed ^ (seed >> 27)) * 0x94D049BB133111EB % 2**64
        seed ^= seed >> 31
    return seed >> 1
