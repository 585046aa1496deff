"""PPO: prompts -> rollout -> scores -> advantages -> losses -> optimiser step, on one set of weights.

`PPOTrainer.train` is the loop; each of its lines is a method below, in the same order. The formulas are in
rlhf_fast/ops (losses, GAE), their constants in rlhf_fast/config.py (PPOConfig).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.algorithms import AdaptiveKLController, FixedKLController, dschat
from rlhf_fast.config import PPOConfig
from rlhf_fast.config_loading import check_config, check_paths
from rlhf_fast.data import ChatFormat, EpochOrder, Examples, PromptExample, load_rows, prompt_dataset
from rlhf_fast.distributed import all_reduce_sum, gather_objects, init_distributed
from rlhf_fast.errors import RewardError
from rlhf_fast.generation import Generator, Rollout
from rlhf_fast.models import check_positions, context_length, load_tokenizer, save_model
from rlhf_fast.rewards import load_reward
from rlhf_fast.trainers.batching import check_ranks, count_steps, micro_batches, seed_everything
from rlhf_fast.trainers.experience import Experience, Scored, mix_seed, sample, score
from rlhf_fast.trainers.ppo_metrics import MeanMetrics, experience_metrics, row_mean, sequence_kl, summed
from rlhf_fast.trainers.ppo_models import PPOModels, sequence_lengths
from rlhf_fast.trainers.ptx import PTXMixture
from rlhf_fast.trainers.run import Metrics, Run
from rlhf_fast.trainers.run_folder import open_run_folder

DRIFT = ("rollout/logprob_drift_max", "rollout/logprob_drift_mean")  # of the training log-probs from the sampler's


class PPOTrainer:
    """Align a causal LM with a reward by PPO (Schulman et al. 2017; Ouyang et al. 2022).

    reward: a function reward(prompts, completions, **columns) -> list of numbers, in place of config.reward.
    """

    def __init__(self, config: PPOConfig, *, reward: Callable[..., Any] | None = None, resume: bool = False) -> None:
        if reward is not None:  # config.yaml tells what was optimised
            name = getattr(reward, "__name__", type(reward).__name__)  # a partial or an object has none
            config = replace(config, reward=f"{reward.__module__}:{name}")
        check_config(config)
        check_paths(config)
        self.config = config
        self.world = init_distributed()
        self.group = torch.distributed.group.WORLD if self.world.world_size > 1 else None
        check_ranks(config, self.world)
        seed_everything(config.seed)
        self.tokenizer = load_tokenizer(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
        self.chat = ChatFormat(self.tokenizer, system_prompt=config.system_prompt, chat_template=config.chat_template)
        context = context_length(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
        self.train_prompts = self._load(config.train_data, context)
        self.eval_prompts = self._load(config.eval_data or [], context)
        self.ptx: PTXMixture | None = None
        if config.unsup_data:
            self.ptx = PTXMixture(config, self.chat, self.tokenizer.pad_token_id, self.world)
        loaded: list[Examples[Any]] = [self.train_prompts, self.eval_prompts]
        loaded += [self.ptx.rows] if self.ptx else []
        self.reward = load_reward(
            reward or config.reward,
            timeout=config.reward_timeout,
            device=str(self.world.device),
            offload=config.offload_reward,
            split=self.world if config.reward_zero_stage == 3 else None,
        )
        prompts_per_step = config.batch_size // config.num_generations
        self.total_steps = count_steps(config, len(self.train_prompts), prompts_per_step)
        self.models = PPOModels(config, self.tokenizer, self.world)
        longest = max(len(prompt.prompt_ids) for prompt in [*self.train_prompts, *self.eval_prompts])
        longest += config.max_new_tokens
        self.models.check_positions(longest if context is None else min(longest, context))
        if self.ptx:
            longest = max(len(row.input_ids) for row in self.ptx.rows)
            check_positions(self.models.causal_lm, longest, "lower max_length")

        checkpoint = open_run_folder(config, self.world, resume=resume)
        engines = self.models.make_engines(self.total_steps)
        self.generator = Generator(
            self.models.causal_lm,
            self.tokenizer,
            backend=config.rollout_backend,
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
        self.kl: FixedKLController | AdaptiveKLController = FixedKLController(config.kl_coef)
        if config.kl_target is not None:
            self.kl = AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
        self.run = Run(
            config,
            self.world,
            total_steps=self.total_steps,
            engines=engines,
            state={"order": self.order, "kl": self.kl} | ({"ptx": self.ptx.order} if self.ptx else {}),
            evaluate=self.evaluate,
            exports=({"final_ema": self.export_average} if config.enable_ema else {}) | {"final": self.export},
            better=lambda metrics: metrics["eval/scores"],
            checkpoint=checkpoint,
            headline={"objective/scores": "score", "objective/kl": "KL", "perf/tokens_per_s": "tok/s"},
            warnings=[data.report() for data in loaded if data.bad_rows],
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
                if scored is None:
                    run.drop("the reward failed", "Mend the reward")
                    continue
            with run.timer("score"):  # a phase of its own: here the ranks meet
                experience = self.experience(scored)
            with run.timer("train"):
                self.update(experience, step)

    def next_prompts(self) -> list[PromptExample]:
        """This rank's prompts of the next step."""
        return [self.train_prompts[i] for i in self.order.next()]

    def rollout(self, prompts: Sequence[PromptExample], step: int) -> Rollout:
        """Sample num_generations completions of each prompt from the weights as they are."""
        with self.models.policy.gathered():
            rollout = sample(self.generator, prompts, self.config, chat=self.chat, step=step, world=self.world)
        self.generator.release_cache()
        return rollout

    def score(self, prompts: Sequence[PromptExample], rollout: Rollout) -> Scored | None:
        """Ask the rewards; raises RewardError before anything can reach the optimiser.

        With on_bad_reward=skip it says what is wrong instead, and returns None on every rank if it was so on one.
        """
        if self.config.on_bad_reward == "error":
            return score(self.reward, self.tokenizer, prompts, rollout)
        scored, failure = None, ""
        try:
            scored = score(self.reward, self.tokenizer, prompts, rollout)
        except RewardError as error:
            failure = str(error)
        failures = [text for text in gather_objects(failure, self.world) if text]
        if failures:
            self.run.say(f"step {self.run.step}: {failures[0]}")
            return None
        return scored

    def experience(self, scored: Scored) -> Experience:
        """Log-probs, values, advantages and returns of a rollout; logs what they look like."""
        config, rollout, mask = self.config, scored.rollout, scored.rollout.mask
        logprobs, ref_logprobs, values = self.old_outputs(rollout)
        scores = scored.rewards.total.to(self.world.device)
        scores = scores - config.missing_eos_penalty * (~rollout.finished).to(scores.dtype)
        if config.normalize_scores:
            scores = self._whiten(scores, torch.ones_like(scores, dtype=torch.bool))
        advantages, returns, rewards = self.advantages(scores, logprobs, ref_logprobs, values, mask)
        if config.whiten_advantages:
            advantages = self._whiten(advantages, mask)

        kl = sequence_kl(logprobs, ref_logprobs, mask)
        self.run.log({"epoch": self.order.epoch, "objective/kl_coef": self.kl.value})
        if config.clip_score is not None:
            scores = scores.clamp(-config.clip_score, config.clip_score)
        metrics = experience_metrics(scored, scores, kl, logprobs, values, returns, rewards, self.world)
        self.run.log(metrics)
        self.run.log_samples(self.run.step, "train", scored.rows(kl, config.num_sample_rows))
        kl_coef = self.kl.value
        if kl is not None and self.policy_learns:
            self.kl.update(metrics["objective/kl"], config.batch_size)  # for the next rollout
        return Experience(rollout, mask, logprobs, ref_logprobs, values, advantages, returns, kl_coef)

    def old_outputs(self, rollout: Rollout) -> tuple[Tensor, Tensor | None, Tensor]:
        """Log-probs of the policy that sampled, of the reference, and values, each [B, T].

        In fp32 the sampler's log-probs are the policy's. In half precision its cached forward and the training forward
        round differently, by more than the clip range for single tokens, so they are computed again in the way that
        the update will (and in float64, where the sampler gives float32).
        """
        mask, again = rollout.mask, self.config.dtype != "float32"
        if self.config.semantics == "dschat":  # reads one column past the end of a response
            mask, again = dschat.live_columns(mask), True
        ref_logprobs, values, logprobs = self.models.forward(rollout, mask, logprobs=again)
        return rollout.logprobs if logprobs is None else logprobs, ref_logprobs, values

    def advantages(
        self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor | None, values: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(advantages, returns, rewards), each [B, T]: KL in the reward, the score at the end, GAE. The rewards are
        those before whitening."""
        config = self.config
        in_reward = config.kl_in == "reward" and ref_logprobs is not None
        kl_coef = self.kl.value if in_reward else 0.0
        if config.semantics == "dschat":
            reference = logprobs if ref_logprobs is None else ref_logprobs
            return dschat.advantages_and_returns(
                scores,
                logprobs,
                reference,
                values,
                mask,
                kl_coef=kl_coef,
                clip_score=config.clip_score,
                gamma=config.gamma,
                lam=config.lam,
                backend=config.ops_backend,
            )
        advantages, returns, rewards = ops.shaped_gae(
            scores,
            logprobs,
            ref_logprobs,
            values,
            mask,
            kl_coef=kl_coef,
            kl_estimator=(config.kl_estimator or "k1") if in_reward else "k1",
            clip_score=config.clip_score,
            backend=config.ops_backend,
            gamma=config.gamma,
            lam=config.lam,
        )
        if config.whiten_rewards:
            whitened = self._whiten(rewards, mask, shift_mean=False)
            advantages, returns = ops.gae(
                whitened, values, mask, gamma=config.gamma, lam=config.lam, backend=config.ops_backend
            )
        return advantages, returns, rewards

    def update(self, experience: Experience, step: int) -> None:
        """num_ppo_epochs passes over the experience, each in num_mini_batches optimiser steps."""
        log = MeanMetrics()
        for epoch in range(self.config.num_ppo_epochs):
            for rows in self._mini_batches(len(experience.mask), step, epoch):
                mixed = self.ptx.accumulate(self.models.policy) if self.ptx and self.policy_learns else {}
                stats = self.accumulate(experience.select(rows)) | mixed
                drift = {name: stats.pop(name) for name in DRIFT if name in stats}
                if log.count == 0:  # the weights are still those that sampled
                    self.run.log(drift)
                elif self.config.target_kl is not None and stats.get("policy/approxkl_avg", 0) > self.config.target_kl:
                    self._zero_grad()
                    self.run.log({**log.means(), "policy/stopped_early": 1.0})
                    return
                log.add({**stats, **self.step()})
        self.run.log(log.means())

    def accumulate(self, experience: Experience) -> Metrics:
        """Add the gradients of one optimiser step; returns its statistics over all ranks."""
        config, world = self.config, self.world
        num_tokens = all_reduce_sum(experience.mask.sum(), world).clamp_min(1)
        lengths, padding_free = sequence_lengths(experience.rollout), self.models.padding_free
        batches = micro_batches(lengths, config.micro_batch_tokens, world, padding_free=padding_free)
        shares: list[dict[str, Tensor]] = []
        for i, batch in enumerate(batches):
            part = experience.select(batch or [0])
            if not batch:  # runs with nothing unmasked: see micro_batches
                part.mask = torch.zeros_like(part.mask)
            divisor = num_tokens
            if config.semantics == "dschat":  # the mean of the micro-batches' means
                divisor = part.mask.sum().clamp_min(1) * len(batches) * world.world_size
            shares.append(self.losses(part, divisor, last=i == len(batches) - 1))
        return summed(shares, world)

    def losses(self, part: Experience, num_tokens: Tensor, *, last: bool) -> dict[str, Tensor]:
        """Losses and gradients of one micro-batch; returns its share of the statistics."""
        config, tokens = self.config, part.rollout.mask  # [b, T] -> [N], in the order of Rollout.sequences
        shared = {"mask": part.mask[tokens], "num_tokens": num_tokens}
        ppo_loss: dict[str, Any] = shared | {
            "old_logprobs": part.old_logprobs[tokens],
            "advantages": part.advantages[tokens],
            "cliprange": config.cliprange,
            "cliprange_high": config.cliprange_high,
            "dual_clip": config.dual_clip,
            "entropy_coef": config.entropy_coef,
        }
        if config.kl_in == "loss" and part.ref_logprobs is not None:
            ppo_loss |= {
                "ref_logprobs": part.ref_logprobs[tokens],
                "kl_coef": part.kl_coef,
                "kl_estimator": config.kl_estimator or "k2",
            }
        value_loss = shared | {
            "old_values": part.values[tokens],
            "returns": part.returns[tokens],
            "cliprange_value": config.cliprange_value,
        }
        policy, value = self.models.backward(
            part.rollout, ppo_loss, value_loss, policy_learns=self.policy_learns, last=last
        )
        stats = {"loss/value_avg": value.loss.detach(), "val/clipfrac_avg": value.stats["value_clip_fraction"]}
        if policy is None:
            return stats
        gap = torch.where(shared["mask"], policy.stats["logprobs"] - part.rollout.logprobs[tokens], 0.0).abs()
        return stats | {
            "loss/policy_avg": policy.policy_loss.detach(),
            "policy/approxkl_avg": policy.stats["approx_kl"],
            "policy/clipfrac_avg": policy.stats["clip_fraction"],
            "policy/entropy_avg": policy.stats["entropy"],
            "policy/ratio_max": policy.stats["ratio_max"],
            "rollout/logprob_drift_max": gap.max(),
            "rollout/logprob_drift_mean": gap.sum() / num_tokens,
        }

    def step(self) -> Metrics:
        """One optimiser step of all that learns: of each, or of none when a gradient of one is not finite."""
        learning = [name for name in self.run.engines if name != "policy" or self.policy_learns]
        engines = {name: self.run.engines[name] for name in learning}
        rates = {"lr": engines["policy"].learning_rate} if "policy" in engines else {}
        finite = [engine.gradients_are_finite() for engine in engines.values()]  # a collective: ask them all
        self.run.check_finite(not all(finite))
        if not all(finite):
            self._zero_grad()
            return rates
        norms = {"policy": "grad_norm", "critic": "value/grad_norm"}
        return rates | {norms[name]: engine.step().grad_norm for name, engine in engines.items()}

    @property
    def policy_learns(self) -> bool:
        """False while the critic warms up: the policy, its schedule and the KL controller then stay as they are."""
        return not 0 < self.run.step <= self.config.critic_warmup  # step 0: before the first

    # ---- evaluation and export ------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> Metrics:
        """Score one completion of each held-out prompt, always with the same random numbers."""
        if not self.eval_prompts:
            return {}
        world = self.world
        prompts = self.eval_prompts[: self.config.num_eval_prompts][world.rank :: world.world_size]
        scored = self.score(prompts, self.rollout(prompts, 0))
        if scored is None:
            return {}
        logprobs, ref_logprobs, _ = self.old_outputs(scored.rollout)
        kl = sequence_kl(logprobs, ref_logprobs, scored.rollout.mask)
        metrics = scored.metrics(world)
        if kl is not None:
            metrics["kl"] = row_mean(kl, world)
        self.run.log_samples(step, "eval", scored.rows(kl))
        return {f"eval/{name}": value for name, value in metrics.items()}

    def export(self, folder: Path) -> None:
        """Write the policy as AutoModelForCausalLM loads it."""
        self._save_within(self.models.policy.gathered(), folder)

    def export_average(self, folder: Path) -> None:
        """The same with the averaged weights."""
        self._save_within(self.models.policy.averaged(), folder)

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _save_within(self, weights: AbstractContextManager[None], folder: Path) -> None:
        with weights:
            if self.world.is_main:
                save_model(self.models.policy_module, self.tokenizer, folder)

    def _whiten(self, x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
        """Over the masked tokens of all ranks."""
        backend = self.config.ops_backend
        return ops.masked_whiten(x, mask, group=self.group, shift_mean=shift_mean, backend=backend)

    def _load(self, path: str | list[str], context: int | None) -> Examples[PromptExample]:
        if not path:
            return Examples([], [])
        rows = load_rows(path, kind="prompt", on_bad_row=self.config.on_bad_row)
        return prompt_dataset(rows, self.chat, max_prompt_length=self.config.max_prompt_length, context=context)

    def _mini_batches(self, rows: int, step: int, epoch: int) -> Iterator[list[int]]:
        """A new permutation of the rows each epoch, the same one after a resume."""
        generator = torch.Generator().manual_seed(mix_seed(self.config.seed, step, self.world.rank, epoch))
        for part in torch.randperm(rows, generator=generator).tensor_split(self.config.num_mini_batches):
            yield part.tolist()

    def _zero_grad(self) -> None:
        for engine in self.run.engines.values():
            engine.zero_grad()
