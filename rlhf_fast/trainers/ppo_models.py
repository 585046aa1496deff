"""The models of PPO: the policy and its critic, which DeepSpeed trains, and the frozen reference."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_fast import ops
from rlhf_fast.config import PPOConfig
from rlhf_fast.distributed import World
from rlhf_fast.engine import Engine, partition_frozen
from rlhf_fast.generation import Rollout
from rlhf_fast.models import (
    Loaded,
    PolicyModel,
    ScalarModel,
    SharedModel,
    adapters_off,
    add_adapters,
    check_positions,
    check_vocabulary,
    load_causal_lm,
    load_scalar_model,
    place_frozen,
    set_gradient_checkpointing,
)
from rlhf_fast.trainers.batching import micro_batches, use_padding_free


class PPOModels:
    """Policy, value and reference log-probs of rollouts, wherever they come from.

    The value model is one of its own (`value_model: separate`) or a head on the policy's trunk (`shared`); there is no
    reference when kl_coef is 0. With use_peft policy and critic have adapters, and the reference is the policy with
    its adapters off, unless ref_model_path names another.
    """

    def __init__(self, config: PPOConfig, tokenizer: PreTrainedTokenizerBase, world: World) -> None:
        self.config, self.pad_id, self.world = config, tokenizer.pad_token_id, world
        path, code = config.model_name_or_path, config.trust_remote_code
        self.causal_lm = load_causal_lm(path, dtype=config.dtype, trust_remote_code=code)
        check_vocabulary(self.causal_lm, tokenizer)
        if config.use_peft:
            add_adapters(self.causal_lm, config)
        self.policy_module: PolicyModel | SharedModel
        self.critic_module: ScalarModel | None = None
        if config.value_model == "shared":
            self.policy_module = SharedModel(self.causal_lm, path)
        else:
            self.policy_module = PolicyModel(self.causal_lm)
            self.critic_module = self._load_critic(tokenizer)
        self.reference: nn.Module | None = None
        self.reference_is_policy = config.use_peft and bool(config.kl_coef) and config.ref_model_path is None
        if config.kl_coef and not self.reference_is_policy:
            reference = load_causal_lm(config.ref_model_path or path, dtype=config.dtype, trust_remote_code=code)
            self.reference = PolicyModel(reference).requires_grad_(False)
            check_vocabulary(reference, tokenizer)
        set_gradient_checkpointing(self.causal_lm, config.gradient_checkpointing)
        models = [model for model in (self.policy_module, self.critic_module, self.reference) if model is not None]
        self.padding_free = use_padding_free(config, models, world)

    def _load_critic(self, tokenizer: PreTrainedTokenizerBase) -> ScalarModel:
        config = self.config
        path = config.value_model_path or config.model_name_or_path
        model = load_scalar_model(path, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
        check_vocabulary(model, tokenizer)  # it reads the policy's tokens
        if config.use_peft:
            add_adapters(model, config)
        set_gradient_checkpointing(model, config.gradient_checkpointing)
        return ScalarModel(model)

    def check_positions(self, longest: int) -> None:
        """Critic and reference can read the policy's longest sequence. Raises ConfigError."""
        for model in (self.critic_module, self.reference):
            if model is not None:
                check_positions(model, longest, "shorten prompts or lower max_new_tokens")

    def make_engines(self, total_steps: int) -> dict[str, Engine]:
        """Hand the models to DeepSpeed, each with its ZeRO stage; total_steps: rollouts of the whole run."""
        config = self.config
        updates = config.num_ppo_epochs * config.num_mini_batches
        in_parts = config.zero_stage == 3 if config.ref_zero_stage is None else config.ref_zero_stage == 3
        self.reference_loaded: Loaded = contextlib.nullcontext
        if self.reference is not None and in_parts:
            offload = config.offload_ref or config.offload_param
            self.reference = partition_frozen(self.reference, config=config, world=self.world, offload=offload)
        elif self.reference is not None:
            self.reference_loaded = place_frozen(self.reference, self.world.device, offload=config.offload_ref)
        self.policy = Engine(
            self.policy_module,
            config=config,
            world=self.world,
            total_steps=(total_steps - config.critic_warmup) * updates,
            ema_decay=config.ema_decay if config.enable_ema else None,
        )
        self.critic: Engine | None = None
        if self.critic_module is None:
            return {"policy": self.policy}
        self.critic = Engine(
            self.critic_module,
            config=config,
            world=self.world,
            total_steps=total_steps * updates,
            learning_rate=config.value_learning_rate,
            zero_stage=config.value_zero_stage,
        )
        return {"policy": self.policy, "critic": self.critic}

    def backward(
        self,
        rollout: Rollout,
        ppo_loss: dict[str, Any],
        value_loss: dict[str, Any],
        *,
        policy_learns: bool,
        last: bool,
    ) -> tuple[ops.PPOLoss | None, ops.ValueLoss]:
        """Losses of one micro-batch and their gradients; on a shared trunk vf_coef weighs the value loss.

        policy_learns: False while a critic of its own warms up. There is no policy loss then.
        ppo_loss, value_loss: the arguments, [N], of these ops besides what the models give. A critic of its own runs
        after the policy's backward, so that the activations of one model are alive at a time.
        """
        inputs, lengths = rollout.sequences(self.pad_id), sequence_lengths(rollout)
        arguments = ppo_loss | self._arguments(lengths)
        if self.critic is None:
            policy, values = self.policy(*inputs, **arguments)
            value = ops.value_loss(values, **value_loss, backend=self.config.ops_backend)
            self.policy.backward(policy.policy_loss + self.config.vf_coef * value.loss, last=last)
        else:
            policy = None
            if policy_learns:
                policy = self.policy(*inputs, **arguments)
                self.policy.backward(policy.policy_loss, last=last)
            values = self.critic(*inputs[:3], lengths=lengths)
            value = ops.value_loss(values, **value_loss, backend=self.config.ops_backend)
            self.critic.backward(value.loss, last=last)
        return policy, value

    @torch.no_grad()
    def forward(self, rollout: Rollout, mask: Tensor, *, logprobs: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Reference log-probs (None without a reference), values and, when asked, the policy's own log-probs.

        Each [B, T]: at the tokens of `mask`, 0 elsewhere. A masked column past the end of a response is a pad token.
        """
        wanted = replace(rollout, mask=mask, tokens=torch.where(rollout.mask, rollout.tokens, self.pad_id))
        zeros = torch.zeros(
            mask.shape,
            dtype=torch.float64 if self.config.dtype == "float64" else torch.float32,
            device=self.world.device,
        )
        found: dict[str, Tensor] = {"values": zeros}
        if self.reference is not None or self.reference_is_policy:
            found["reference"] = zeros.clone()
        if logprobs:
            found["logprobs"] = zeros.clone()
        lengths = sequence_lengths(wanted)
        budget = self.config.micro_batch_tokens
        with self.reference_loaded():
            for batch in micro_batches(lengths, budget, self.world, padding_free=self.padding_free):
                part = wanted.select(batch) if batch else self._idle()
                flat = self._frozen_outputs(part, logprobs)
                if batch:
                    for name, into in found.items():
                        into[batch] = part.scatter(flat[name])
        return found.get("reference"), found["values"], found.get("logprobs")

    def _idle(self) -> Rollout:
        """One token, for a rank that has no rows left (or none at all) while the others run a forward."""
        zero = torch.zeros(1, 1, device=self.world.device)
        return Rollout([[self.pad_id]], zero.long(), zero == 0, zero, zero, ["length"])

    def _arguments(self, lengths: list[int]) -> dict[str, Any]:
        """What every forward of a policy takes."""
        config = self.config
        return {"lengths": lengths, "temperature": config.temperature, "ops_backend": config.ops_backend}

    def _frozen_outputs(self, rollout: Rollout, logprobs: bool) -> dict[str, Tensor]:
        inputs, lengths = rollout.sequences(self.pad_id), sequence_lengths(rollout)
        arguments = self._arguments(lengths)
        flat: dict[str, Tensor] = {}
        if self.critic is not None:
            flat["values"] = self.critic(*inputs[:3], lengths=lengths)
        if logprobs or self.critic is None:
            outputs = self.policy(*inputs, **arguments)
            flat["logprobs"] = outputs[0]
            if self.critic is None:
                flat["values"] = outputs[2]
        if self.reference is not None:
            flat["reference"] = self.reference(*inputs, **arguments)[0]
        elif self.reference_is_policy:
            with adapters_off(self.causal_lm):
                flat["reference"] = self.policy(*inputs, **arguments)[0]
        return flat


def sequence_lengths(rollout: Rollout) -> list[int]:
    """Tokens of each row's prompt and response together."""
    return [len(prompt) + n for prompt, n in zip(rollout.prompt_ids, rollout.lengths.tolist(), strict=True)]
