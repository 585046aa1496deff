"""From a file and flat key=value overrides to a config. Every mistake is named with its place, all at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from rlhf_fast.config import PPOConfig, RewardConfig, SFTConfig, TrainerConfig
from rlhf_fast.errors import ConfigError

from .rules import check_config, config_problems, raise_problems
from .values import WrongTypeError, convert, takes
from .yaml_file import Given, read_yaml

C = TypeVar("C", bound=TrainerConfig)
CLASSES: tuple[type[TrainerConfig], ...] = (SFTConfig, RewardConfig, PPOConfig)

# Names in TRL, transformers and DeepSpeed-Chat, for those who come from there.
ELSEWHERE = {
    "beta": "kl_coef",
    "bf16": "dtype: bfloat16",
    "dataset_name": "train_data",
    "early_stopping": "target_kl",
    "eval_dataset": "eval_data",
    "fp16": "dtype: float16",
    "generation_batch_size": "rollout_batch_size",
    "gradient_accumulation_steps": "batch_size (of one step) and micro_batch_tokens (of one forward)",
    "init_kl_coef": "kl_coef",
    "logging_steps": "nothing: every step is logged",
    "max_answer_seq_len": "max_new_tokens",
    "max_completion_length": "max_new_tokens",
    "max_prompt_seq_len": "max_prompt_length",
    "max_seq_length": "max_length",
    "model": "model_name_or_path",
    "per_device_train_batch_size": "batch_size (of one step, over all ranks)",
    "ppo_epochs": "num_ppo_epochs",
    "response_length": "max_new_tokens",
    "reward_funcs": "reward",
    "reward_model_path": "reward",
    "sft_model_path": "model_name_or_path and ref_model_path",
    "train_dataset": "train_data",
    "use_liger_kernel": "ops_backend",
    "warmup_steps": "warmup_ratio",
}


def load_config(
    cls: type[C], file: Path | None = None, overrides: Sequence[str] = (), *, output_dir: str | None = None
) -> C:
    """A config of the class from a YAML file, "key=value" overrides on top, and output_dir on top of those.

    The last of several overrides of one key counts. Values are YAML ("a=[1, 2]", "a=null"); text stays as it is
    written. None is null or none. Paths stay relative to the current directory; that they exist is for check_paths.

    Raises ConfigError with every unknown key, wrong type, missing field and broken rule (check_config), each with its
    place.
    """
    hints = get_type_hints(cls)
    given = read_yaml(file) if file is not None else {}
    given |= _split_overrides(overrides, hints)
    if output_dir is not None:
        given["output_dir"] = Given(output_dir, f"--output_dir {output_dir}")
    values, problems = _convert_all(given, cls)
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.name not in given
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        problems.append(f"missing: {', '.join(missing)}. Set them in {file or 'a file'} or as {missing[0]}=...")
    raise_problems(problems)
    config = cls(**values)
    raise_problems(
        [
            f"{given[name].where + ': ' if name in given else ''}{name}: {problem}"
            for name, problem in config_problems(config)
        ]
    )
    check_config(config)  # for its warnings
    return config


def parse_overrides(overrides: Sequence[str], cls: type) -> dict[str, Any]:
    """Arguments of a dataclass from "key=value" strings, converted to its fields' types. Raises ConfigError."""
    values, problems = _convert_all(_split_overrides(overrides, get_type_hints(cls)), cls)
    raise_problems(problems)
    return values


def _split_overrides(overrides: Sequence[str], hints: dict[str, Any]) -> dict[str, Given]:
    given = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{override}: key=value was expected.")
        if key.startswith("-"):
            raise ConfigError(f"{override}: overrides have no dashes; write {override.lstrip('-')}")
        key = key.strip()
        given[key] = Given(_override_value(override, text.strip(), hints.get(key, Any)), override)
    return given


def _override_value(override: str, text: str, hint: Any) -> Any:
    """Text for a text field is taken as it is, unless it is null, quoted, or a list where a list may stand."""
    if text in ("none", "None", "NONE"):
        return None
    is_yaml = text in ("null", "~") or (text[:1] in ("'", '"') and text[-1:] == text[:1] and len(text) > 1)
    if takes(hint, str) and not is_yaml and not (takes(hint, list) and text.startswith("[")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override}: not YAML: {getattr(error, 'problem', None) or error}.") from None


def _convert_all(given: dict[str, Given], cls: type) -> tuple[dict[str, Any], list[str]]:
    """The values in their types, and what is wrong with the others."""
    types = get_type_hints(cls)
    hints = {field.name: types[field.name] for field in dataclasses.fields(cls)}
    values, problems = {}, []
    for key, entry in given.items():
        if key not in hints:
            problems.append(f"{entry.where}: unknown key {key!r}; {_suggestion(key, entry.value, cls, list(hints))}")
            continue
        try:
            values[key] = convert(entry.value, hints[key])
        except WrongTypeError as error:
            problems.append(f"{entry.where}: {key}: {error}")
    return values, problems


def _suggestion(key: str, value: Any, cls: type, names: list[str]) -> str:
    if key in ELSEWHERE:
        return f"here it is {ELSEWHERE[key]}."
    owners = [other.__name__ for other in CLASSES if key in {field.name for field in dataclasses.fields(other)}]
    if owners:
        return f"it belongs to {' and '.join(owners)}, this is a {cls.__name__}."
    near = get_close_matches(key.lower().replace("-", "_"), names, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    if isinstance(value, dict):
        return "keys are flat: write what is inside it without indentation."
    return f"{cls.__name__} has none like it."
