"""What a run needs before it starts: memory for each model and the tokens of a step (`--dry_run`).

An estimate from shapes alone; no weights are loaded. training_memory.py has its parts, docs/scaling.md what is counted
and how it compares with measured runs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from rlhf_fast.config import PPOConfig, RewardConfig, TrainerConfig
from rlhf_fast.errors import ConfigError, ModelError
from rlhf_fast.models import add_adapters, load_model_config
from rlhf_fast.training_memory import (
    BYTES,
    EngineMemory,
    MicroBatch,
    Shape,
    cache,
    engine_memory,
    frozen_forward,
    kept_by_layer,
    micro_batch,
    model_pass,
    slack,
    training_peak,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPORTS = 0.48e9  # Python, torch, transformers and DeepSpeed once they are imported (measured)
RUNTIME = 0.08e9  # what they take besides while they run: pages of libraries, tokenizer, metrics (measured)


@dataclass(frozen=True)
class Line:
    """Bytes of one model or buffer on one rank."""

    name: str
    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    other: float = 0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.other


@dataclass(frozen=True)
class Plan:
    """Lines of memory, the tokens of a step, and what the machine has."""

    lines: list[Line]
    tokens: dict[str, int]
    available: float

    @property
    def total(self) -> float:
        return sum(line.total for line in self.lines)

    def check(self) -> None:
        """Raise ConfigError when the plan does not fit."""
        if self.total > self.available:
            largest = max(self.lines, key=lambda line: line.total)
            raise ConfigError(
                f"this run needs about {_gb(self.total)} on a rank and {_gb(self.available)} are free; the largest "
                f"part is {largest.name} with {_gb(largest.total)}. Lower micro_batch_tokens or rollout_batch_size, "
                "set gradient_checkpointing=true, dtype=bfloat16, zero_stage=2 with more ranks, or a smaller model."
            )

    def __str__(self) -> str:
        head = f"{'':<24}{'weights':>11}{'gradients':>11}{'optimizer':>11}{'other':>11}{'total':>11}"
        rows = [
            f"{x.name:<24}" + "".join(f"{_gb(v):>11}" for v in (x.weights, x.gradients, x.optimizer, x.other, x.total))
            for x in self.lines
        ]
        sums = f"{'all, on one rank':<24}{'':>44}{_gb(self.total):>11}   ({_gb(self.available)} free)"
        tokens = [f"{name}: {count:,}" for name, count in self.tokens.items()]
        tokens = ["", "tokens of a step, at most", *tokens] if tokens else []
        return "\n".join(["memory", head, *rows, sums, *tokens])


def memory_plan(config: TrainerConfig) -> Plan:
    """Estimate the memory of one rank and the tokens of one step. Raises ModelError when a folder has no config."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))  # as a launcher says
    code = config.trust_remote_code
    shape = _shape(config.model_name_or_path, config)
    on_gpu = torch.cuda.is_available()
    lines = [Line("program", other=IMPORTS + RUNTIME)]
    if isinstance(config, PPOConfig):
        reference = _shape(config.ref_model_path or config.model_name_or_path, replace(config, use_peft=False))
        critic = _shape(config.value_model_path or config.model_name_or_path, config)
        rewards = {
            f"reward {Path(name).name}": 4.0 * _parameters(_without_weights(name, "SequenceClassification", code))
            for name in _reward_folders(config.reward)
        }
        fetched = 0.0
        if config.offload_reward and on_gpu:  # one at a time is on the GPU
            fetched, rewards = max(rewards.values(), default=0.0), {}
        elif config.reward_zero_stage == 3 and ranks > 1:  # whole while they score
            fetched, rewards = sum(rewards.values()), {name: size / ranks for name, size in rewards.items()}
        lines += ppo_lines(shape, config, ranks, critic=critic, reference=reference, fetched=fetched, on_gpu=on_gpu)
        lines += [Line(name, weights=size) for name, size in rewards.items()]
        tokens = {
            "prompts": config.batch_size // config.num_generations * config.max_prompt_length,
            "new": config.batch_size * config.max_new_tokens,
            "trained": config.batch_size * config.max_new_tokens * config.num_ppo_epochs,
            "optimiser steps": config.num_ppo_epochs * config.num_mini_batches,
        }
    else:
        sequences = 2 if isinstance(config, RewardConfig) else 1
        wanted = 0 if isinstance(config, RewardConfig) else config.max_length
        rows = config.batch_size // ranks
        batch = micro_batch(rows, sequences * config.max_length, config.micro_batch_tokens, wanted_in_row=wanted)
        engine = engine_memory(shape, config, ranks)
        one = model_pass(shape, config, engine, batch, on_gpu=on_gpu)
        peak = training_peak([one], several=batch.several)
        lines.append(_line("model", engine, config, on_gpu))
        lines.append(Line("activations", other=max(0.0, peak - engine.gradients)))
        lines.append(Line("allocator", other=slack([one])))
        tokens = {"trained": config.batch_size * sequences * config.max_length, "optimiser steps": 1}
    tokens["one micro-batch"] = config.micro_batch_tokens
    return Plan(lines, tokens, _available())


def ppo_lines(
    policy: Shape,
    config: PPOConfig,
    ranks: int,
    *,
    critic: Shape | None = None,
    reference: Shape | None = None,
    fetched: float = 0.0,
    on_gpu: bool,
) -> list[Line]:
    """PPO's own models and buffers on one rank. critic, reference: shapes, where they are not the policy's. fetched:
    what reward models take only while they score. on_gpu: what is offloaded leaves the memory that is counted."""
    critic, reference = critic or policy, reference or policy
    width = BYTES[config.dtype]
    rows, new = max(1, config.batch_size // ranks), config.max_new_tokens
    length = config.max_prompt_length + new
    mini = -(-rows // config.num_mini_batches)
    batch = micro_batch(mini, length, config.micro_batch_tokens, wanted_in_row=new)

    engine = engine_memory(policy, config, ranks)
    policy_batch = batch
    if config.unsup_data:  # every token of a row may be learnt
        mixed = micro_batch(rows, config.max_length, config.micro_batch_tokens, wanted_in_row=config.max_length)
        policy_batch = MicroBatch(max(batch.tokens, mixed.tokens), max(batch.wanted, mixed.wanted), several=True)
    passes = [model_pass(policy, config, engine, policy_batch, on_gpu=on_gpu)]
    lines = [_line("policy", engine, config, on_gpu)]
    if config.enable_ema:  # one more of the optimiser's tensors: two moments and, but for stage 0, master weights
        whole = config.zero_stage == 0 and width >= 4
        lines.append(Line("policy's average", other=lines[0].optimizer / (2 if whole else 3)))
    if config.value_model == "separate":
        stage = config.zero_stage if config.value_zero_stage is None else config.value_zero_stage
        of_critic = replace(config, zero_stage=stage)
        engine = engine_memory(critic, of_critic, ranks)
        passes.append(model_pass(critic, of_critic, engine, replace(batch, wanted=0), on_gpu=on_gpu))
        lines.append(_line("value model", engine, of_critic, on_gpu))
    if config.kl_coef and not (config.use_peft and config.ref_model_path is None):
        in_parts = (config.zero_stage if config.ref_zero_stage is None else config.ref_zero_stage) == 3
        offloaded = on_gpu and (config.offload_ref or (in_parts and config.offload_param))
        weights = reference.parameters * width / (ranks if in_parts else 1)
        lines.append(Line("reference", weights=0 if offloaded else weights))
        if offloaded and not in_parts:
            fetched = max(fetched, weights)

    # Phases follow one another: what the decoder holds, and what is fetched to score, is gone before
    # training, and the gradients before the rollout.
    gathered = policy.parameters * width * (1 - 1 / ranks) if config.zero_stage == 3 else 0
    standing = sum(p.engine.standing for p in passes)
    asked = micro_batch(rows, length, config.micro_batch_tokens, wanted_in_row=new)
    peak = max(
        standing + cache(policy, config, min(rows, config.rollout_batch_size), length) + gathered,
        standing + frozen_forward(policy, config, asked, on_gpu=on_gpu) + fetched,
        training_peak(passes, several=policy_batch.several),
    )
    gradients = sum(p.engine.gradients for p in passes)
    return [
        *lines,
        Line("rollout or activations", other=max(0.0, peak - gradients)),
        Line("allocator", other=slack(passes)),
    ]


def _line(name: str, engine: EngineMemory, config: TrainerConfig, on_gpu: bool) -> Line:
    return Line(
        name,
        weights=0 if config.offload_param and on_gpu else engine.weights,
        gradients=engine.gradients,
        optimizer=0 if config.offload_optimizer and on_gpu else engine.optimizer,
    )


def _without_weights(path: str, kind: str, trust_remote_code: bool) -> PreTrainedModel:
    """The folder's model as transformers' AutoModelFor... makes it, on the meta device."""
    import transformers

    config = load_model_config(path, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            auto = getattr(transformers, f"AutoModelFor{kind}")
            return auto.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError:
        raise ModelError(f"{path}: model_type {config.model_type!r} has no {kind} form in transformers") from None


def _parameters(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


def _shape(path: str, config: TrainerConfig) -> Shape:
    model = _without_weights(path, "CausalLM", config.trust_remote_code)
    if config.use_peft:
        add_adapters(model, config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    text: Any = model.config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    kv_width = (getattr(text, "num_key_value_heads", None) or heads) * head_dim
    return Shape(
        parameters=_parameters(model),
        trained=sum(model.get_parameter(name).numel() for name in trained),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=intermediate,
        kv_width=kv_width,
        vocabulary=text.vocab_size,
        tied=bool(text.tie_word_embeddings),
        kept=kept_by_layer(
            text.hidden_size,
            intermediate,
            kv_width,
            norms_trained=not config.use_peft,
            mlp_trained=any("mlp" in name for name in trained),
        ),
    )


def _reward_folders(reward: object) -> list[str]:
    sources = [reward] if isinstance(reward, str) else [part["source"] for part in reward]  # type: ignore[attr-defined]
    return [source for source in sources if source and Path(source).is_dir()]


def _available() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    return float(psutil.virtual_memory().available)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size else "-"
