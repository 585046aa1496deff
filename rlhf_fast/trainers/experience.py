"""What one rollout is worth: the tensors that the PPO update learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_fast.config import PPOConfig
from rlhf_fast.data import ChatFormat, PromptExample
from rlhf_fast.distributed import World, all_reduce_sum
from rlhf_fast.generation import Generator, Rollout, SamplingParams
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
    generator: Generator,
    prompts: Sequence[PromptExample],
    config: PPOConfig,
    *,
    chat: ChatFormat,
    step: int,
    world: World,
) -> Rollout:
    """Complete each prompt num_generations times; step 0 is evaluation: once, always with the same random numbers.

    The numbers belong to a prompt's place among those of all ranks, dealt out in turn: any number of ranks draws the
    same completions.
    """
    params = SamplingParams(
        n=config.num_generations if step else 1,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        max_tokens=config.max_new_tokens,
        min_tokens=config.min_new_tokens,
        stop_token_ids=[*chat.stop_token_ids, *(config.stop_token_ids or [])],
    )
    places = range(world.rank, world.world_size * len(prompts), world.world_size)
    seeds = [mix_seed(config.seed, step, 0, place) for place in places]
    return generator.rollout([prompt.prompt_ids for prompt in prompts], params, seeds=seeds)


def score(
    reward: Reward, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[PromptExample], rollout: Rollout
) -> Scored:
    """Ask the rewards for one number a completion. Every rank calls it. Raises RewardError."""
    samples = len(rollout.prompt_ids) // max(len(prompts), 1)
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    completions = [
        tokenizer.decode(tokens[:length], skip_special_tokens=True)
        for tokens, length in zip(rollout.tokens.tolist(), rollout.lengths.tolist(), strict=True)
    ]
    names = sorted({name for prompt in repeated for name in prompt.columns})
    columns = {name: [prompt.columns.get(name) for prompt in repeated] for name in names}
    with reward.gathered():
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
    kl_coef: float  # of this rollout, for a KL in the loss

    def select(self, rows: Sequence[int]) -> Experience:
        """The experience of some rows, in that order."""
        index = torch.as_tensor(list(rows), dtype=torch.long, device=self.mask.device)
        return Experience(
            rollout=self.rollout.select(rows),
            mask=self.mask[index],
            old_logprobs=self.old_logprobs[index],
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs[index],
            values=self.values[index],
            advantages=self.advantages[index],
            returns=self.returns[index],
            kl_coef=self.kl_coef,
        )


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers: the same for the same numbers, unrelated for any others."""
    seed = 0
    for part in parts:  # SplitMix64 (Steele, Lea and Flood 2014)
        seed = (seed + part + 0x9E3779B97F4A7C15) % 2**64
        seed = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        seed = (seed ^ (seed >> 27)) * 0x94D049BB133111EB % 2**64
        seed ^= seed >> 31
    return seed >> 1
