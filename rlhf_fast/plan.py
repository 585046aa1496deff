"""What a run needs before it starts: memory for each model and the tokens of a step (`--dry_run`).

An estimate from shapes alone; no weights are loaded. It counts what grows with the model and the batch: weights,
gradients, optimiser state, KV cache, activations and logits of one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from rlhf_fast.config import PPOConfig, RewardConfig, TrainerConfig
from rlhf_fast.errors import ConfigError, ModelError
from rlhf_fast.models import add_adapters, load_model_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
OVERHEAD = 0.6e9  # Python, torch, transformers and DeepSpeed with nothing loaded (measured)


@dataclass(frozen=True)
class Shape:
    """What memory depends on in a causal LM."""

    parameters: int
    trained: int  # of them: all, or the adapters
    layers: int
    hidden: int
    intermediate: int
    kv_width: int  # key-value heads times head size
    vocabulary: int


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


def memory_plan(config: TrainerConfig, *, world_size: int | None = None) -> Plan:
    """Estimate the memory of one rank and the tokens of one step. Raises ModelError when a folder has no config."""
    import os

    ranks = world_size or int(os.environ.get("WORLD_SIZE", "1"))
    code = config.trust_remote_code
    shape = _shape(config.model_name_or_path, config)
    lines = [Line("program", other=OVERHEAD)]
    micro = config.micro_batch_tokens
    if isinstance(config, PPOConfig):
        reference = _shape(config.ref_model_path or config.model_name_or_path, replace(config, use_peft=False))
        critic = _shape(config.value_model_path or config.model_name_or_path, config)
        rewards = {
            f"reward {Path(name).name}": 4.0 * _parameters(_without_weights(name, "SequenceClassification", code))
            for name in _reward_folders(config.reward)
        }
        fetched = 0.0
        if config.offload_reward and torch.cuda.is_available():  # one at a time is on the GPU
            fetched, rewards = max(rewards.values(), default=0.0), {}
        lines += ppo_lines(shape, config, ranks, critic=critic, reference=reference, fetched=fetched)
        lines += [Line(name, weights=size) for name, size in rewards.items()]
        tokens = {
            "prompts": config.batch_size // config.num_generations * config.max_prompt_length,
            "new": config.batch_size * config.max_new_tokens,
            "trained": config.batch_size * config.max_new_tokens * config.num_ppo_epochs,
            "optimiser steps": config.num_ppo_epochs * config.num_mini_batches,
        }
    else:
        lines.append(_trained("model", shape, config, ranks, torch.cuda.is_available()))
        head_tokens = 0 if isinstance(config, RewardConfig) else micro
        lines.append(Line("activations", other=_activations(shape, config, micro, head_tokens=head_tokens)))
        sequences = 2 if isinstance(config, RewardConfig) else 1
        tokens = {"trained": config.batch_size * sequences * config.max_length, "optimiser steps": 1}
    tokens["one micro-batch"] = micro
    return Plan(lines, tokens, _available())


def ppo_lines(
    policy: Shape,
    config: PPOConfig,
    ranks: int,
    *,
    critic: Shape | None = None,
    reference: Shape | None = None,
    fetched: float = 0.0,
    on_gpu: bool | None = None,
) -> list[Line]:
    """PPO's own models and buffers on one rank. critic, reference: shapes, where they are not the policy's. fetched:
    the largest reward model that is offloaded. on_gpu: what is offloaded leaves the memory that is counted; None: if
    there is a GPU."""
    critic, reference = critic or policy, reference or policy
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    width, micro = BYTES[config.dtype], config.micro_batch_tokens
    lines = [_trained("policy", policy, config, ranks, on_gpu)]
    if config.enable_ema:  # one more of the optimiser's tensors: two moments and, in half precision, master weights
        lines.append(Line("policy's average", other=lines[0].optimizer / (3 if width < 4 else 2)))
    if config.value_model == "separate":
        stage = config.value_zero_stage
        of_critic = config if stage is None else replace(config, zero_stage=stage)
        lines.append(_trained("value model", critic, of_critic, ranks, on_gpu))
    if config.kl_coef and not (config.use_peft and config.ref_model_path is None):
        in_parts = (config.zero_stage if config.ref_zero_stage is None else config.ref_zero_stage) == 3
        offloaded = on_gpu and (config.offload_ref or (in_parts and config.offload_param))
        weights = reference.parameters * width / (ranks if in_parts else 1)
        lines.append(Line("reference", weights=0 if offloaded else weights))
        if offloaded and not in_parts:
            fetched = max(fetched, weights + 4.0 * micro * reference.vocabulary)  # with its logits
    rows = max(1, config.batch_size // ranks)
    length = config.max_prompt_length + config.max_new_tokens
    cache = 2 * policy.layers * policy.kv_width * min(rows, config.rollout_batch_size) * length * width
    gathered = policy.parameters * width * (1 - 1 / ranks) if config.zero_stage == 3 else 0
    most, head_tokens = micro, min(micro, rows * config.max_new_tokens)
    if config.unsup_data:  # a row may be longer than a micro-batch, and every token of it be learnt
        most = head_tokens = max(micro, config.max_length)
    trained = _activations(policy, config, most, head_tokens=head_tokens)
    if config.value_model == "separate":  # its forward comes after the policy's backward
        trained = max(trained, _activations(critic, config, micro, head_tokens=0))
    # The decoder's cache, and the weights gathered for it, are freed before training, and so is what was fetched to
    # score: the largest of them counts.
    return [*lines, Line("rollout or activations", other=max(cache + gathered, fetched, trained))]


def _trained(name: str, shape: Shape, config: TrainerConfig, ranks: int, on_gpu: bool) -> Line:
    """Weights, gradients and AdamW's two moments; half precision adds fp32 master weights and gradients. ZeRO
    (Rajbhandari et al. 2020) splits the optimiser from stage 1, gradients from 2, weights from 3."""
    half = config.dtype in ("bfloat16", "float16")
    width, n = BYTES[config.dtype], shape.trained
    stage = max(config.zero_stage, 1 if half else 0)  # the engine's own rule
    split = [ranks if stage >= at else 1 for at in (1, 2, 3)]
    return Line(
        name,
        weights=0 if config.offload_param and on_gpu else shape.parameters * width / split[2],
        gradients=n * (width + 4 if half else width) / split[1],
        optimizer=0 if config.offload_optimizer and on_gpu else n * (12 if half else 2 * width) / split[0],
    )


def _activations(shape: Shape, config: TrainerConfig, tokens: int, *, head_tokens: int) -> float:
    """Saved for the backward pass of one micro-batch: per layer two norms, query, key, value, attention, two residuals
    and three MLP tensors (with checkpointing one a layer, and one layer's whole); logits and their gradient in fp32."""
    width = BYTES[config.dtype]
    layer = tokens * width * (8 * shape.hidden + 2 * shape.kv_width + 4 * shape.intermediate)
    if config.gradient_checkpointing:
        body = layer + shape.layers * tokens * width * shape.hidden
    else:
        body = layer * shape.layers
    return body + 2 * 4.0 * head_tokens * shape.vocabulary


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
    text: Any = model.config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        parameters=_parameters(model),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        kv_width=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        vocabulary=text.vocab_size,
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
