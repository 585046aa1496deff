"""PPO: prompts -> rollout -> scores -> advantages -> losses -> optimiser step, on one set of weights.

`PPOTrainer.train` is the loop; each of its lines is a method below, in the same order. The formulas are in
rlhf_fast/ops (losses, GAE), their constants in rlhf_fast/config.py (PPOConfig).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.algorithms import AdaptiveKLController, FixedKLController
from rlhf_fast.config import PPOConfig
from rlhf_fast.data import ChatFormat, EpochOrder, PromptExample, load_rows, prompt_dataset
from rlhf_fast.distributed import all_reduce_sum, init_distributed
from rlhf_fast.engine import Engine
from rlhf_fast.errors import ConfigError
from rlhf_fast.generation import Generator, Rollout
from rlhf_fast.models import (
    PolicyModel,
    ScalarModel,
    SharedModel,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    save_model,
    set_gradient_checkpointing,
)
from rlhf_fast.rewards import load_reward
from rlhf_fast.trainers.batching import count_steps, micro_batches, seed_everything
from rlhf_fast.trainers.experience import (
    Experience,
    Scored,
    explained_variance,
    masked_max,
    masked_mean,
    mix_seed,
    normalized,
    sample,
    score,
    sequence_kl,
)
from rlhf_fast.trainers.run import Metrics, Run, open_run_folder


class PPOTrainer:
    """Align a causal LM with a reward by PPO (Schulman et al. 2017; Ouyang et al. 2022).

    reward: a function reward(prompts, completions, **columns) -> list of numbers, in place of config.reward.
    """

    def __init__(self, config: PPOConfig, *, reward: Callable[..., Any] | None = None, resume: bool = False) -> None:
        self.config = config
        self.world = init_distributed()
        seed_everything(config.seed)
        self.tokenizer = load_tokenizer(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
        chat = ChatFormat(self.tokenizer, system_prompt=config.system_prompt, chat_template=config.chat_template)
        self.train_prompts = self._load(config.train_data, chat)
        self.eval_prompts = self._load(config.eval_data, chat)[: config.num_eval_prompts] if config.eval_data else []
        self.reward = load_reward(reward or config.reward, timeout=config.reward_timeout, device=str(self.world.device))
        prompts_per_step = config.batch_size // config.num_generations
        self.total_steps = count_steps(config, len(self.train_prompts), prompts_per_step)
        self.updates_per_step = config.num_ppo_epochs * config.num_mini_batches
        self._load_models()

        checkpoint = open_run_folder(config, self.world, resume=resume)
        self._make_engines()
        self.generator = Generator(
            self.policy.module.model,
            self.tokenizer,
            max_batch_size=config.rollout_batch_size,
            ops_backend=config.ops_backend,
        )
        self.order = EpochOrder(
            len(self.train_prompts),
            prompts_per_step,
            seed=config.seed,
            rank=self.world.rank,
            world_size=self.world.world_size,
        )
        self.kl = (
            FixedKLController(config.kl_coef)
            if config.kl_target is None
            else AdaptiveKLController(config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)
        )
        self.run = Run(
            config,
            self.world,
            total_steps=self.total_steps,
            engines={"policy": self.policy} | ({"critic": self.critic} if self.critic else {}),
            state={"order": self.order, "kl": self.kl},
            evaluate=self.evaluate,
            export=self.export,
            better=lambda metrics: metrics["eval/scores"],
            checkpoint=checkpoint,
            headline={"objective/scores": "score", "objective/kl": "KL", "perf/tokens_per_s": "tok/s"},
        )

    # ---- the loop -------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run all steps that are left; writes the run's folder."""
        run = self.run
        for step in run.steps():
            prompts = self.next_prompts()
            with run.timer("rollout"):
                rollout = self.rollout(prompts, step)
            with run.timer("score"):
                scored = self.score(prompts, rollout)
                experience = self.experience(scored)
            with run.timer("train"):
                self.update(experience, step)

    def next_prompts(self) -> list[PromptExample]:
        """This rank's prompts of the next step."""
        return [self.train_prompts[i] for i in self.order.next()]

    def rollout(self, prompts: Sequence[PromptExample], step: int) -> Rollout:
        """Sample num_generations completions of each prompt from the weights as they are."""
        with self.policy.gathered():
            rollout = sample(self.generator, prompts, self.config, step=step, rank=self.world.rank)
        self.generator.release_cache()
        return rollout

    def score(self, prompts: Sequence[PromptExample], rollout: Rollout) -> Scored:
        """Ask the rewards; raises RewardError before anything can reach the optimiser."""
        return score(self.reward, self.tokenizer, prompts, rollout)

    def experience(self, scored: Scored) -> Experience:
        """Log-probs, values, advantages and returns of a rollout, and what the log says of it."""
        config, rollout, mask = self.config, scored.rollout, scored.rollout.mask
        ref_logprobs, values, recomputed = self.forward(rollout)
        logprobs = rollout.logprobs if recomputed is None else recomputed
        scores = scored.rewards.total.to(self.world.device)
        scores = scores - config.missing_eos_penalty * (~rollout.finished).to(scores.dtype)
        if config.normalize_scores:
            scores = normalized(scores, self.world)
        in_reward = config.kl_in == "reward" and ref_logprobs is not None
        advantages, returns, rewards = ops.shaped_gae(
            scores,
            logprobs,
            ref_logprobs if ref_logprobs is not None else logprobs,
            values,
            mask,
            kl_coef=self.kl.value if in_reward else 0.0,
            kl_estimator=config.kl_estimator or "k1" if in_reward else "k1",
            gamma=config.gamma,
            lam=config.lam,
            clip_score=config.clip_score,
            backend=config.ops_backend,
        )
        group = torch.distributed.group.WORLD if self.world.world_size > 1 else None
        if config.whiten_rewards:
            rewards = ops.masked_whiten(rewards, mask, group=group, shift_mean=False)
            advantages, returns = ops.gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
        if config.whiten_advantages:
            advantages = ops.masked_whiten(advantages, mask, group=group)

        self._log_experience(scored, logprobs, ref_logprobs, values, returns, rewards)
        return Experience(rollout, mask, logprobs, ref_logprobs, values, advantages, returns)

    @torch.no_grad()
    def forward(self, rollout: Rollout) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Reference log-probs, values and, where the sampler's are not exact enough, the policy's own log-probs.

        Each [B, T]; one forward without gradients. In half precision the sampler's cached forward and the training
        forward round differently, which moves single ratios by more than the clip range: the policy's log-probs are
        then computed again in the way that the update will.
        """
        like = {"size": rollout.mask.shape, "device": self.world.device}
        like["dtype"] = torch.float64 if self.config.dtype == "float64" else torch.float32
        values = torch.zeros(**like)
        ref_logprobs = torch.zeros(**like) if self.reference else None
        recomputed = torch.zeros(**like) if self.config.dtype != "float32" else None
        lengths = [len(p) + n for p, n in zip(rollout.prompt_ids, rollout.lengths.tolist(), strict=True)]
        for batch in micro_batches(lengths, self.config.micro_batch_tokens, self.world):
            part = rollout.select(batch or [0])
            inputs = part.sequences(self.tokenizer.pad_token_id)
            found = self._values(inputs)
            if batch:
                values[batch] = part.scatter(found)
            if recomputed is not None:
                found = self._policy(inputs)[0]
                if batch:
                    recomputed[batch] = part.scatter(found)
            if self.reference and ref_logprobs is not None and batch:
                ref_logprobs[batch] = part.scatter(self._logprobs(self.reference, inputs))
        return ref_logprobs, values, recomputed

    def update(self, experience: Experience, step: int) -> None:
        """num_ppo_epochs passes over the experience, each in num_mini_batches optimiser steps."""
        config, log = self.config, _Means()
        for epoch in range(config.num_ppo_epochs):
            for rows in self._mini_batches(len(experience.mask), step, epoch):
                first = log.count == 0
                stats, drift = self.accumulate(experience.select(rows))
                if first:  # the weights are still those that sampled
                    self.run.log({"rollout/logprob_drift_max": drift[0], "rollout/logprob_drift_mean": drift[1]})
                if config.target_kl is not None and stats["policy/approxkl_avg"] > config.target_kl and not first:
                    self.zero_grad()
                    self.run.log(log.means() | {"policy/stopped_early": 1.0})
                    return
                if math.isfinite(stats["loss/policy_avg"]) and math.isfinite(stats["loss/value_avg"]):
                    log.add(stats | self.step())
                else:  # one bad loss drops the batch for both models
                    self.zero_grad()
                    self.run.check_finite(True)
                    log.add(stats)
        self.run.log(log.means())

    def accumulate(self, experience: Experience) -> tuple[Metrics, tuple[float, float]]:
        """Add the gradients of one optimiser step; returns its statistics and the drift (max, mean) of log-probs."""
        num_tokens = all_reduce_sum(experience.mask.sum(), self.world).clamp_min(1)
        batches = micro_batches(experience.lengths, self.config.micro_batch_tokens, self.world)
        totals: dict[str, Tensor] = {}
        drift_sum, drift_max = torch.zeros((), device=self.world.device), 0.0
        for i, batch in enumerate(batches):
            part = experience.select(batch or [0])
            if not batch:  # runs with nothing unmasked: see micro_batches
                part.mask = torch.zeros_like(part.mask)
            last = i == len(batches) - 1
            stats, logprobs = self.losses(part, num_tokens, last=last)
            for name, value in stats.items():
                old = totals.get(name, torch.zeros_like(value))
                totals[name] = torch.maximum(old, value) if name == "policy/ratio_max" else old + value
            gap = torch.where(part.mask, logprobs - part.rollout.logprobs, 0.0).abs()
            drift_sum += gap.sum()
            drift_max = max(drift_max, float(gap.max()))
        stats_of_all = {
            name: masked_max(value[None], torch.ones(1, dtype=torch.bool, device=value.device), self.world)
            if name == "policy/ratio_max"
            else float(all_reduce_sum(value, self.world))
            for name, value in totals.items()
        }
        drift_mean = float(all_reduce_sum(drift_sum, self.world) / num_tokens)
        return stats_of_all, (drift_max, drift_mean)

    def losses(self, part: Experience, num_tokens: Tensor, *, last: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Losses and gradients of one micro-batch; returns its share of the statistics and the new log-probs [b, T]."""
        config = self.config
        inputs = part.rollout.sequences(self.tokenizer.pad_token_id)
        outputs = self._policy(inputs)
        logprobs, entropy = part.rollout.scatter(outputs[0]), part.rollout.scatter(outputs[1])
        values = part.rollout.scatter(outputs[2] if self.critic is None else self.critic(*inputs[:3]))
        policy = ops.ppo_loss(
            logprobs,
            part.old_logprobs,
            part.advantages,
            part.mask,
            cliprange=config.cliprange,
            cliprange_high=config.cliprange_high,
            dual_clip=config.dual_clip,
            ref_logprobs=part.ref_logprobs if config.kl_in == "loss" else None,
            kl_coef=self.kl.value if config.kl_in == "loss" else 0.0,
            kl_estimator=config.kl_estimator or "k2" if config.kl_in == "loss" else "k2",
            entropy=entropy,
            entropy_coef=config.entropy_coef,
            num_tokens=num_tokens,
            backend=config.ops_backend,
        )
        value = ops.value_loss(
            values,
            part.values,
            part.returns,
            part.mask,
            cliprange_value=config.cliprange_value,
            num_tokens=num_tokens,
            backend=config.ops_backend,
        )
        if self.critic is None:
            self.policy.backward(policy.policy_loss + config.vf_coef * value.loss, last=last)
        else:
            self.policy.backward(policy.policy_loss, last=last)
            self.critic.backward(value.loss, last=last)
        stats = {
            "loss/policy_avg": policy.policy_loss.detach(),
            "loss/value_avg": value.loss.detach(),
            "policy/approxkl_avg": policy.stats["approx_kl"],
            "policy/clipfrac_avg": policy.stats["clip_fraction"],
            "policy/entropy_avg": policy.stats["entropy"],
            "policy/ratio_max": policy.stats["ratio_max"],
            "val/clipfrac_avg": value.stats["value_clip_fraction"],
        }
        return stats, logprobs.detach()

    def step(self) -> Metrics:
        """One optimiser step of the policy and the critic; a model whose gradient is not finite stays as it is."""
        metrics = {"lr": self.policy.learning_rate}
        results = {name: engine.step() for name, engine in self.run.engines.items()}
        metrics["grad_norm"] = results["policy"].grad_norm
        if self.critic:
            metrics["value/grad_norm"] = results["critic"].grad_norm
        self.run.check_finite(any(result.skipped and not result.rescaled for result in results.values()))
        return metrics

    def zero_grad(self) -> None:
        """Drop the gradients that were accumulated."""
        for engine in self.run.engines.values():
            engine.zero_grad()

    # ---- evaluation and export ------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> Metrics:
        """Score one completion of each held-out prompt, always with the same random numbers."""
        if not self.eval_prompts:
            return {}
        prompts = self.eval_prompts[self.world.rank :: self.world.world_size]
        scored = self.score(prompts, self.rollout(prompts, 0))
        ref_logprobs, _, recomputed = self.forward(scored.rollout)
        logprobs = scored.rollout.logprobs if recomputed is None else recomputed
        kl = sequence_kl(logprobs, ref_logprobs, scored.rollout.mask)
        metrics = scored.metrics(self.world)
        if kl is not None:
            metrics["kl"] = masked_mean(kl, torch.ones_like(kl, dtype=torch.bool), self.world)
        self.run.log_samples(step, "eval", scored.rows(kl))
        return {f"eval/{name}": value for name, value in metrics.items()}

    def export(self, folder: Path) -> None:
        """Write the policy as AutoModelForCausalLM loads it."""
        with self.policy.gathered():
            save_model(self.policy.module.model, self.tokenizer, folder)

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _load(self, path: str | list[str], chat: ChatFormat) -> list[PromptExample]:
        rows = load_rows(path, kind="prompt", on_bad_row=self.config.on_bad_row)
        return prompt_dataset(rows, chat, max_prompt_length=self.config.max_prompt_length)

    def _load_models(self) -> None:
        config = self.config
        code = config.trust_remote_code
        model = load_causal_lm(config.model_name_or_path, dtype=config.dtype, trust_remote_code=code)
        shared = config.value_model == "shared"
        self._policy_module = SharedModel(model) if shared else PolicyModel(model)
        self._critic_module = None
        if not shared:
            path = config.value_model_path or config.model_name_or_path
            critic = load_scalar_model(path, dtype=config.dtype, trust_remote_code=code)
            if critic.get_input_embeddings().weight.shape[0] < len(self.tokenizer):
                raise ConfigError(
                    f"value_model_path: {path} has a smaller vocabulary than the policy's tokenizer; "
                    "the value model reads the policy's tokens and needs the same tokenizer"
                )
            set_gradient_checkpointing(critic, config.gradient_checkpointing)
            self._critic_module = ScalarModel(critic)
        self.reference = None
        if config.kl_coef:
            path = config.ref_model_path or config.model_name_or_path
            reference = PolicyModel(load_causal_lm(path, dtype=config.dtype, trust_remote_code=code))
            self.reference = reference.requires_grad_(False).to(self.world.device)
        set_gradient_checkpointing(model, config.gradient_checkpointing)

    def _make_engines(self) -> None:
        config, updates = self.config, self.total_steps * self.updates_per_step
        self.policy = Engine(self._policy_module, config=config, world=self.world, total_steps=updates)
        self.critic = None
        if self._critic_module is not None:
            self.critic = Engine(
                self._critic_module,
                config=config,
                world=self.world,
                total_steps=updates,
                learning_rate=config.value_learning_rate,
            )

    def _policy(self, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        return self.policy(*inputs, temperature=self.config.temperature, ops_backend=self.config.ops_backend)

    def _logprobs(self, model: PolicyModel, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        return model(*inputs, temperature=self.config.temperature, ops_backend=self.config.ops_backend)[0]

    def _values(self, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        return self._policy(inputs)[2] if self.critic is None else self.critic(*inputs[:3])

    def _mini_batches(self, rows: int, step: int, epoch: int) -> Iterator[list[int]]:
        """A new permutation of the rows each epoch, the same one after a resume."""
        generator = torch.Generator().manual_seed(mix_seed(self.config.seed, step, self.world.rank, epoch))
        for part in torch.randperm(rows, generator=generator).tensor_split(self.config.num_mini_batches):
            yield part.tolist()

    def _log_experience(
        self,
        scored: Scored,
        logprobs: Tensor,
        ref_logprobs: Tensor | None,
        values: Tensor,
        returns: Tensor,
        rewards: Tensor,
    ) -> None:
        world, mask = self.world, scored.rollout.mask
        every = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
        kl = sequence_kl(logprobs, ref_logprobs, mask)
        metrics = scored.metrics(world)
        total = masked_mean(rewards.sum(-1), every, world)
        row = {
            "epoch": self.order.epoch,
            "objective/scores": metrics.pop("scores"),
            "objective/scores_std": metrics.pop("scores_std"),
            "objective/rlhf_reward": total,
            "objective/entropy": masked_mean(-logprobs.sum(-1), every, world),
            "objective/kl_coef": self.kl.value,
            "val/mean": masked_mean(values, mask, world),
            "val/explained_var": explained_variance(values, returns, mask, world),
            "returns/mean": masked_mean(returns, mask, world),
            "completions/mean_length": metrics.pop("mean_length"),
            "completions/eos_rate": metrics.pop("eos_rate"),
            "completions/distinct_2": metrics.pop("distinct_2"),
            "num_tokens": float(all_reduce_sum(mask.sum(), world)),
            **{name: value for name, value in metrics.items() if name.startswith("rewards/")},
        }
        if kl is not None:
            row["objective/kl"] = masked_mean(kl, every, world)
            row["objective/non_score_reward"] = -self.kl.value * row["objective/kl"]
            self.kl.update(row["objective/kl"], self.config.batch_size)
        self.run.log(row)
        self.run.log_samples(self.run.step, "train", scored.rows(kl, self.config.num_sample_rows))


class _Means:
    """Running means of dicts of numbers."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, list[float]] = {}

    def add(self, metrics: Metrics) -> None:
        self.count += 1
        for name, value in metrics.items():
            self._sums.setdefault(name, []).append(value)

    def means(self) -> Metrics:
        return {
            name: max(values) if name.endswith("_max") else sum(values) / len(values)
            for name, values in self._sums.items()
        }
