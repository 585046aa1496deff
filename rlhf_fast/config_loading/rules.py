"""What the values of a config must be, beyond their types: ranges, and fields that contradict each other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from rlhf_fast.config import PPOConfig, RewardConfig, TrainerConfig
from rlhf_fast.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """low <= x <= high; `above` and `below`: without the end itself."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, x: float) -> bool:
        return (self.low < x if self.above else self.low <= x) and (x < self.high if self.below else x <= self.high)

    def __str__(self) -> str:
        low = f"{'more than' if self.above else 'at least'} {self.low:.10g}"
        high = f"{'less than' if self.below else 'at most'} {self.high:.10g}"
        return low if math.isinf(self.high) else f"{low} and {high}"


POSITIVE, AT_LEAST_0, AT_LEAST_1 = Range(0, above=True), Range(0), Range(1)
FROM_0_TO_1 = Range(0, 1)

# Fields that may be None have no range then.
RANGES: dict[type[TrainerConfig], dict[str, Range]] = {
    TrainerConfig: {
        "max_length": AT_LEAST_1,
        "lora_r": AT_LEAST_1,
        "lora_alpha": AT_LEAST_1,
        "learning_rate": AT_LEAST_0,
        "warmup_ratio": FROM_0_TO_1,
        "weight_decay": AT_LEAST_0,
        "adam_beta1": Range(0, 1, below=True),
        "adam_beta2": Range(0, 1, below=True),
        "adam_epsilon": POSITIVE,
        "max_grad_norm": AT_LEAST_0,
        "skip_grad_norm": POSITIVE,
        "max_steps": AT_LEAST_1,
        "batch_size": AT_LEAST_1,
        "micro_batch_tokens": AT_LEAST_1,
        "seed": Range(0, 2**32, below=True),  # numpy's limit
        "eval_steps": AT_LEAST_1,
        "save_steps": AT_LEAST_1,
        "save_total_limit": AT_LEAST_1,
        "max_nonfinite_steps": AT_LEAST_1,
        "rank_timeout": POSITIVE,
    },
    RewardConfig: {"center_rewards_coefficient": AT_LEAST_0},
    PPOConfig: {
        "reward_timeout": AT_LEAST_0,
        "missing_eos_penalty": AT_LEAST_0,
        "clip_score": POSITIVE,
        "value_learning_rate": AT_LEAST_0,
        "critic_warmup": AT_LEAST_0,
        "num_generations": AT_LEAST_1,
        "max_prompt_length": AT_LEAST_1,
        "max_new_tokens": AT_LEAST_1,
        "min_new_tokens": AT_LEAST_0,
        "temperature": POSITIVE,
        "top_p": Range(0, 1, above=True),
        "top_k": AT_LEAST_0,
        "min_p": Range(0, 1, below=True),
        "rollout_batch_size": AT_LEAST_1,
        "num_ppo_epochs": AT_LEAST_1,
        "num_mini_batches": AT_LEAST_1,
        "gamma": FROM_0_TO_1,
        "lam": FROM_0_TO_1,
        "cliprange": POSITIVE,
        "cliprange_high": AT_LEAST_0,
        "dual_clip": Range(1, above=True),
        "cliprange_value": POSITIVE,
        "vf_coef": AT_LEAST_0,
        "kl_coef": AT_LEAST_0,
        "kl_target": POSITIVE,
        "kl_horizon": AT_LEAST_1,
        "target_kl": POSITIVE,
        "ema_decay": FROM_0_TO_1,
        "unsup_coef": AT_LEAST_0,
        "num_eval_prompts": AT_LEAST_1,
        "num_sample_rows": AT_LEAST_0,
    },
}

DATA = ("train_data", "eval_data", "unsup_data")  # files or folders

HINTS = {
    "skip_grad_norm": "null: no step is dropped for its size",
    "max_steps": "null: num_train_epochs decides",
    "eval_steps": "null: before and after training only",
    "save_steps": "null: no checkpoints",
    "temperature": "greedy sampling, 0, explores nothing",
    "clip_score": "null: no clipping",
    "cliprange_value": "null: no clipping",
    "kl_target": "null: a fixed kl_coef",
    "target_kl": "null: no early stop",
}


def config_problems(config: TrainerConfig) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with it) for every rule that the config breaks. Looks at no file."""
    for of_class, ranges in RANGES.items():
        if not isinstance(config, of_class):
            continue
        for name, allowed in ranges.items():
            value = getattr(config, name)
            if value is not None and value not in allowed:
                hint = f" ({HINTS[name]})" if name in HINTS else ""
                yield name, f"must be {allowed}, got {value!r}{hint}."
    yield from _common(config)
    if isinstance(config, PPOConfig):
        yield from _ppo(config)


def check_config(config: TrainerConfig) -> None:
    """Raises ConfigError that names every field whose value cannot work, alone or with another's. Reads no file."""
    raise_problems([f"{name}: {problem}" for name, problem in config_problems(config)])
    if isinstance(config, PPOConfig) and config.kl_in == "reward" and config.kl_estimator in ("k2", "k3"):
        warnings.warn(
            f"kl_estimator: {config.kl_estimator} in the reward is a biased pull to the reference model; "
            "k1 is the KL divergence itself there.",
            stacklevel=2,
        )


def raise_problems(problems: list[str]) -> None:
    """One ConfigError for all of them, if there are any."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems))


def check_paths(config: TrainerConfig) -> None:
    """Raises ConfigError for files and folders that the config names and that are not there. Paths start at the cwd."""
    folders = [("model_name_or_path", config.model_name_or_path)]
    files = [(name, path) for name in DATA for path in _listed(getattr(config, name, None))]
    if config.chat_template is not None and _is_file_name(config.chat_template):
        files.append(("chat_template", config.chat_template))
    if isinstance(config, PPOConfig):
        from rlhf_fast.rewards.sources import is_url, reward_sources

        folders += [
            ("ref_model_path", config.ref_model_path or ""),
            ("value_model_path", config.value_model_path or ""),
        ]
        rewards = len(folders)
        for entry in reward_sources(config.reward):
            source = str(entry.source)
            if is_url(source):
                continue
            if ":" not in source or Path(source).is_dir():
                folders.append(("reward", source))
            elif source.rpartition(":")[0].endswith(".py"):
                files.append(("reward", source.rpartition(":")[0]))
        for name in ("offload_reward", "reward_zero_stage"):
            if getattr(config, name) and len(folders) == rewards:
                raise_problems([f"{name}: none of the rewards is a model's folder, so there are no weights to move."])
    problems = [_missing(name, path, "folder") for name, path in folders if path and not Path(path).is_dir()]
    problems += [_missing(name, path, "file or folder") for name, path in files if not Path(path).exists()]
    if Path(config.output_dir).exists() and not Path(config.output_dir).is_dir():
        problems.append(f"output_dir: {config.output_dir} is a file; a folder was expected.")
    raise_problems(problems)


def _missing(name: str, path: str, kind: str) -> str:
    parent = Path(path).parent
    if not parent.is_dir():
        return f"{name}: no {kind} {path} (looked in {Path.cwd()})."
    near = get_close_matches(Path(path).name, [entry.name for entry in parent.iterdir()], n=1)
    hint = f" Did you mean {parent / near[0]}?" if near else ""
    return f"{name}: no {kind} {Path(path).name} in {parent.resolve()}.{hint}"


def _listed(paths: str | list[str] | None) -> list[str]:
    return [paths] if isinstance(paths, str) else paths or []


def _is_file_name(chat_template: str) -> bool:
    """Not a template itself, nor the name of one of the tokenizer's."""
    return "{{" not in chat_template and "{%" not in chat_template and bool(Path(chat_template).suffix)


def _common(c: TrainerConfig) -> Iterator[tuple[str, str]]:
    for name in ("model_name_or_path", "output_dir", "train_data"):
        value = getattr(c, name)
        if not value or (isinstance(value, str) and not value.strip()):
            yield name, f"must not be empty, got {value!r}."
    if c.max_steps is None and c.num_train_epochs <= 0:
        yield "num_train_epochs", f"must be more than 0 unless max_steps is set, got {c.num_train_epochs!r}."
    if c.eval_steps is not None and not c.eval_data:
        yield "eval_steps", "there is nothing to evaluate: set eval_data, or eval_steps: null."
    if c.offload_optimizer and c.zero_stage == 0:
        yield "offload_optimizer", "DeepSpeed offloads the optimizer in ZeRO only: set zero_stage to 1, 2 or 3."
    if c.lora_dropout:
        yield (
            "lora_dropout",
            f"must be 0, got {c.lora_dropout!r}: dropout is off everywhere, since PPO's ratio compares two forwards of "
            "the same function.",
        )
    if c.lora_target_modules is not None and not c.lora_target_modules:
        yield "lora_target_modules", f"is empty ({c.lora_target_modules!r}): name some layers, or null for the usual."
    if c.offload_param and c.zero_stage != 3:
        yield (
            "offload_param",
            "weights are split, and can be fetched layer by layer, in ZeRO-3 only: set zero_stage to 3.",
        )
    if c.nvme_path is not None and not (c.offload_optimizer or c.offload_param):
        yield "nvme_path", "nothing goes there: set offload_optimizer or offload_param to true, or leave it out."


def _ppo(c: PPOConfig) -> Iterator[tuple[str, str]]:
    from rlhf_fast.rewards.sources import FORMS, reward_sources

    if not c.reward:
        yield "reward", f"is missing: {FORMS}."
    else:
        try:
            reward_sources(c.reward)
        except ConfigError as error:
            yield "reward", str(error).removeprefix("reward: ")
    if c.num_generations >= 1 and c.batch_size % c.num_generations:
        yield (
            "batch_size",
            f"counts completions: it must be a multiple of num_generations ({c.num_generations}), got {c.batch_size}.",
        )
    if c.num_mini_batches >= 1 and c.batch_size % c.num_mini_batches:
        yield "batch_size", f"must be a multiple of num_mini_batches ({c.num_mini_batches}), got {c.batch_size}."
    if c.normalize_scores and c.batch_size < 2:
        yield "normalize_scores", "one completion has no deviation: set batch_size to 2 or more."
    if c.min_new_tokens > c.max_new_tokens:
        yield "min_new_tokens", f"must be at most max_new_tokens ({c.max_new_tokens}), got {c.min_new_tokens}."
    if any(token < 0 for token in c.stop_token_ids or []):
        yield "stop_token_ids", f"token ids are at least 0, got {c.stop_token_ids!r}."
    if c.repetition_penalty != 1:
        yield (
            "repetition_penalty",
            f"must be 1 in PPO, got {c.repetition_penalty!r}: sampled tokens would not be the policy's own, and the "
            "ratio to its log-probs would be wrong.",
        )
    if c.kl_in == "loss" and c.kl_estimator == "k1":
        yield "kl_estimator", "k1 in the loss has a gradient of zero on average: use k2 (the default there) or k3."
    if c.kl_target is not None and c.kl_coef == 0:
        yield "kl_target", "needs kl_coef above 0 to start from; with 0 there is no reference model."
    if c.value_model == "shared":
        for name in ("value_model_path", "value_learning_rate", "value_zero_stage"):
            if getattr(c, name) is not None:
                yield name, "a shared value head has no model and no optimizer of its own: leave it null."
        if c.critic_warmup:
            yield "critic_warmup", "the value loss moves a shared trunk, and with it the policy: set it to 0."
    if c.value_zero_stage is not None:
        for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
            if getattr(c, name) and c.value_zero_stage < lowest:
                yield "value_zero_stage", f"{name} needs at least {lowest} for the value model too."
    if c.offload_reward and c.reward_zero_stage:
        yield "reward_zero_stage", "with offload_reward its weights are on the host already: choose one of the two."
    if c.offload_ref and not c.kl_coef:
        yield "offload_ref", "with kl_coef 0 there is no reference to offload: set it to false."
    elif c.offload_ref and c.use_peft and c.ref_model_path is None:
        yield "offload_ref", "the reference is the policy with its adapters off, which stays: set it to false."
    if bool(c.unsup_coef) != bool(c.unsup_data):
        missing, there = ("unsup_data", "unsup_coef") if c.unsup_coef else ("unsup_coef", "unsup_data")
        yield missing, f"is needed beside {there}: {getattr(c, there)!r}, or leave both out."
    if c.semantics == "dschat":
        yield from _dschat(c)


def _dschat(c: PPOConfig) -> Iterator[tuple[str, str]]:
    """DeepSpeed-Chat has none of these; half its formulas would be neither its nor ours."""
    needed = {
        "kl_in": ("reward",),
        "kl_estimator": (None, "k1"),
        "kl_target": (None,),
        "target_kl": (None,),
        "whiten_advantages": (False,),
        "whiten_rewards": (False,),
        "normalize_scores": (False,),
        "missing_eos_penalty": (0,),
        "cliprange_high": (None,),
        "dual_clip": (None,),
        "entropy_coef": (0,),
        "value_model": ("separate",),
    }
    if c.unsup_coef:
        yield (
            "unsup_coef",
            "semantics: dschat would take a step of its own for it, which this trainer does not; set it to 0.",
        )
    words = {None: "null", False: "false"}
    for name, allowed in needed.items():
        value = getattr(c, name)
        if value not in allowed:
            wanted = allowed[0] if not isinstance(allowed[0], bool | None) else words[allowed[0]]
            yield name, f"semantics: dschat has no such thing; set {name}: {wanted}, got {value!r}."
