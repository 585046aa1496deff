"""What a PPO run takes past this machine: memory, traffic and time a step, on paper (`rlhf-fast plan`).

A cost model from shapes alone. docs/scaling.md derives each line and holds it against measured runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from rlhf_fast.config import PPOConfig
from rlhf_fast.config_loading import check_config, parse_overrides
from rlhf_fast.errors import ConfigError
from rlhf_fast.plan import IMPORTS, RUNTIME, Line, Plan, ppo_lines
from rlhf_fast.training_memory import BYTES, Shape, kept_by_layer


@dataclass(frozen=True)
class Machine:
    """One accelerator and its links. Rates are data sheets'; `efficiency` says what share of them programs reach."""

    memory: float  # bytes
    flops: float  # a second, dense, in half precision
    bandwidth: float  # bytes a second to its own memory
    link: float  # bytes a second and direction to the others in its node
    network: float  # bytes a second and direction to other nodes
    efficiency: float = 0.45  # of flops, in training
    reading: float = 0.7  # of bandwidth, while decoding


MACHINES = {
    "a100-40gb": Machine(40e9, 312e12, 1.56e12, 300e9, 25e9),
    "a100-80gb": Machine(80e9, 312e12, 2.04e12, 300e9, 25e9),
    "h100": Machine(80e9, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Machine(141e9, 989e12, 4.8e12, 450e9, 50e9),
    "b200": Machine(180e9, 2250e12, 8.0e12, 900e9, 50e9),
    "l40s": Machine(48e9, 362e12, 0.864e12, 32e9, 12.5e9),
}


def llama(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, *, tied: bool = False
) -> Shape:
    """A Llama: attention, gated MLP, two norms a layer, a norm at the end, embedding and head."""
    kv_width = kv_heads * (hidden // heads)
    layer = 2 * hidden * hidden + 2 * hidden * kv_width + 3 * hidden * intermediate + 2 * hidden
    parameters = layers * layer + hidden + (1 if tied else 2) * vocabulary * hidden
    return Shape(
        parameters=parameters,
        trained=parameters,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        kv_width=kv_width,
        vocabulary=vocabulary,
        tied=tied,
        kept=kept_by_layer(hidden, intermediate, kv_width),
    )


# Shapes of well-known models of about that size.
SIZES = {
    "135m": llama(30, 576, 1536, 9, 3, 49_152, tied=True),  # SmolLM2
    "1b": llama(16, 2048, 8192, 32, 8, 128_256, tied=True),  # Llama 3.2
    "3b": llama(28, 3072, 8192, 24, 8, 128_256, tied=True),
    "8b": llama(32, 4096, 14_336, 32, 8, 128_256),  # Llama 3.1
    "14b": llama(48, 5120, 13_824, 40, 8, 152_064),  # Qwen2.5
    "32b": llama(64, 5120, 27_648, 40, 8, 152_064),
    "70b": llama(80, 8192, 28_672, 64, 8, 128_256),  # Llama 3.1
    "405b": llama(126, 16_384, 53_248, 128, 8, 128_256),
}


# A step as people run it; overrides change it. Paths are not read.
DEFAULTS: dict[str, Any] = {
    "model_name_or_path": "-",
    "train_data": "-",
    "reward": "plan.py:reward",
    "dtype": "bfloat16",
    "batch_size": 512,
    "max_prompt_length": 1024,
    "max_new_tokens": 1024,
    "micro_batch_tokens": 8192,
    "gradient_checkpointing": True,
}


@dataclass(frozen=True)
class StepCost:
    """One PPO step on all GPUs together: seconds by phase, and bytes that each GPU sends."""

    seconds: dict[str, float]
    sent: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def memory(shape: Shape, config: PPOConfig, machine: Machine, gpus: int) -> Plan:
    """Bytes on each GPU: policy, value model and reference of one shape. The rollout needs the policy whole on each
    GPU; under ZeRO-3 that is gathered for it, beside what stays."""
    lines = [Line("program", other=IMPORTS + RUNTIME), *ppo_lines(shape, config, gpus, on_gpu=True)]
    return Plan(lines, {}, machine.memory)


def step_cost(shape: Shape, config: PPOConfig, machine: Machine, gpus: int, per_node: int = 8) -> StepCost:
    """Time and traffic of one step of `config` (batch_size completions of max_prompt_length + max_new_tokens)."""
    width, weights = BYTES[config.dtype], shape.parameters * BYTES[config.dtype]
    rows = config.batch_size / gpus
    rate, reading = machine.flops * machine.efficiency, machine.bandwidth * machine.reading
    length = config.max_prompt_length + config.max_new_tokens
    tokens = rows * length
    sender = machine.link if gpus <= per_node else machine.network

    # Multiplications of one token in the layers, causal attention over half the length among them, and in the head.
    # A token's embedding is looked up, and the head is asked for response tokens alone.
    head = shape.vocabulary * shape.hidden
    layers = shape.parameters - head * (1 if shape.tied else 2) + length * shape.hidden * shape.layers
    new = rows * config.max_new_tokens

    # Decoding: each new token of the rows decoded together reads all weights once, and each row its keys and values.
    together = min(rows, config.rollout_batch_size)
    cached = 2 * shape.layers * shape.kv_width * width * (config.max_prompt_length + config.max_new_tokens / 2)
    read = weights - (0 if shape.tied else head * width)
    reads = (read + together * cached) / reading
    products = 2 * (layers + head) * together / rate
    rounds = max(1.0, rows / together)
    prompts = rows / config.num_generations * config.max_prompt_length
    rollout = rounds * config.max_new_tokens * max(reads, products) + 2 * layers * prompts / rate

    models = 1 if config.value_model == "shared" else 2  # that are trained
    # Value, reference, and the old log-probs again, which a shared trunk gives with its values. The head, where asked.
    again = config.dtype != "float32"
    heads = bool(config.kl_coef) + (again or models == 1)
    frozen = 1 + bool(config.kl_coef) + (again and models == 2)
    forwards = 4 if config.gradient_checkpointing else 3  # a backward pass is two more, a checkpointed layer runs again
    mixed = rows * config.max_length if config.unsup_data else 0  # tokens of the policy alone, at most
    trained = forwards * layers * (models * tokens + mixed) + 3 * head * (new + mixed)
    steps = config.num_ppo_epochs * config.num_mini_batches
    share = (gpus - 1) / gpus
    stage = max(config.zero_stage, 1 if config.dtype in ("bfloat16", "float16") else 0)  # the engine's own rule
    gradients = models * shape.parameters * 4 * share  # fp32, reduced and scattered
    batches = max(1.0, tokens / config.micro_batch_tokens)
    passes = config.num_ppo_epochs * max(config.num_mini_batches, batches)  # forward and backward, of a micro-batch
    sent = {"gradients": steps * 2 * gradients if stage < 2 else passes * gradients}  # DeepSpeed reduces in each pass
    if stage in (1, 2):
        sent["weights after a step"] = steps * models * weights * share
    if stage == 3:
        sent["weights, forward and backward"] = passes * 2 * models * weights * share
        sent["weights, frozen forwards"] = batches * frozen * weights * share
        sent["weights for the rollout"] = weights * share
    seconds = {
        "rollout": rollout,
        "score": 2 * (frozen * layers * tokens + heads * head * new) / rate,
        "train": config.num_ppo_epochs * 2 * trained / rate,
        "traffic": sum(sent.values()) / sender if gpus > 1 else 0.0,
    }
    return StepCost(seconds, sent if gpus > 1 else {})


def plan_report(size: str, gpus: int, gpu: str = "h100", per_node: int = 8, overrides: Sequence[str] = ()) -> str:
    """What `rlhf-fast plan` prints: memory for each ZeRO stage, then lines, time and traffic of the first that fits.

    overrides: "key=value" fields of PPOConfig; which ZeRO stage is the answer, not a question. Raises ConfigError.
    """
    shape, machine = _named(SIZES, size, "model-size"), _named(MACHINES, gpu, "gpu")
    if gpus < 1 or per_node < 1:
        raise ConfigError(f"--gpus and --gpus-per-node must be at least 1, got {gpus} and {per_node}")
    fields = parse_overrides(overrides, PPOConfig)
    for name in ("zero_stage", "offload_optimizer", "offload_param", "nvme_path"):
        if name in fields:
            raise ConfigError(f"{name}: the plan says what is needed; leave it out")
    if fields.get("use_peft"):
        raise ConfigError("use_peft: the plan is for training all weights; --dry_run counts adapters too")
    config = PPOConfig(**DEFAULTS | fields)
    check_config(config)
    if config.batch_size < gpus * config.num_generations:
        raise ConfigError(
            f"batch_size: {config.batch_size} completions leave some of the {gpus} GPUs with nothing to do"
        )
    choices: list[tuple[Literal[0, 1, 2, 3], bool]] = [
        *((0, False), (1, False), (2, False), (3, False)),
        *((2, True), (3, True)),
    ]
    stages = {
        f"zero_stage {stage}" + (" + offload_optimizer" if offload else ""): replace(
            config, zero_stage=stage, offload_optimizer=offload
        )
        for stage, offload in choices
    }
    plans = {name: memory(shape, each, machine, gpus) for name, each in stages.items()}
    rows = [
        f"{name:<32}{plan.total / 1e9:>9.1f} GB{'' if plan.total <= machine.memory else '   does not fit'}"
        for name, plan in plans.items()
    ]
    fitting = next((name for name, plan in plans.items() if plan.total <= machine.memory), None)
    head = [
        f"{shape.parameters / 1e9:.2f}B weights, {gpus} GPUs of {machine.memory / 1e9:.0f} GB, {config.dtype}",
        "",
        "memory of one GPU",
        *rows,
        "",
    ]
    if fitting is None:
        whole = shape.parameters * BYTES[config.dtype]
        why = (
            f"The rollout gathers the policy whole on each GPU: {whole / 1e9:.0f} GB of {machine.memory / 1e9:.0f}. "
            "Take GPUs with more memory, or a smaller model."
            if whole > 0.8 * machine.memory
            else "Take more GPUs, or lower micro_batch_tokens or rollout_batch_size."
        )
        return "\n".join([*head, f"nothing fits. {why}"])
    cost = step_cost(shape, stages[fitting], machine, gpus, per_node)
    return "\n".join(
        [
            *head,
            f"the first that fits: {fitting}",
            str(plans[fitting]),
            "",
            f"one step of {config.batch_size} completions, {config.max_prompt_length} + {config.max_new_tokens} tokens",
            *(f"{phase:<32}{seconds:>9.1f} s" for phase, seconds in cost.seconds.items()),
            f"{'all, if nothing overlaps':<32}{cost.total:>9.1f} s",
            *(f"sent by each GPU: {what:<26}{size / 1e9:>9.1f} GB" for what, size in cost.sent.items()),
        ]
    )


Choice = TypeVar("Choice", Shape, Machine)


def _named(choices: Mapping[str, Choice], name: str, option: str) -> Choice:
    if name.lower() not in choices:
        raise ConfigError(f"--{option}: {name!r} is not one of {', '.join(choices)}")
    return choices[name.lower()]
