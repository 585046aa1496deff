"""SFT, reward model and PPO one after the other, from one small file that names their configs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf_fast.config import PPOConfig, RewardConfig, SFTConfig, TrainerConfig
from rlhf_fast.config_loading import load_config
from rlhf_fast.errors import ConfigError

STAGES: dict[str, type[TrainerConfig]] = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}


def load_pipeline(
    file: Path, overrides: Sequence[str] = (), *, output_dir: str | None = None
) -> Iterator[tuple[str, TrainerConfig]]:
    """Read a file such as `{sft: sft.yaml, reward: reward.yaml, ppo: ppo.yaml}`; paths are relative to it.

    Overrides carry their stage: `ppo.max_steps=10`. With `output_dir`, each stage writes to output_dir/STAGE, and a
    later stage's paths that lay in an earlier stage's old folder follow it there. All configs are read, and refused
    when wrong, before the first stage runs.
    """
    try:
        named = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config: there is no file {file}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(named, dict) or not named or not set(named) <= set(STAGES):
        raise ConfigError(f"{file}: expected the names of config files under {', '.join(STAGES)}; got {named!r}")
    of_stage: dict[str, list[str]] = {stage: [] for stage in named}
    for override in overrides:
        stage, dot, rest = override.partition(".")
        if not dot or stage not in of_stage:
            raise ConfigError(
                f"{override}: an override of a pipeline names its stage, such as {next(iter(named))}.{override}"
            )
        of_stage[stage].append(rest)
    moved: dict[str, str] = {}
    configs = []
    for stage in (stage for stage in STAGES if stage in named):
        config = load_config(STAGES[stage], file.parent / named[stage], of_stage[stage])
        if output_dir is not None:
            old, config.output_dir = config.output_dir, str(Path(output_dir) / stage)
            for name, value in vars(config).items():
                if name != "output_dir":
                    setattr(config, name, _follow(value, moved))
            moved[old] = config.output_dir
        configs.append((stage, config))
    return iter(configs)


def planned(stages: Iterable[tuple[str, TrainerConfig]]) -> Iterator[tuple[str, TrainerConfig]]:
    """The stages for a memory plan: what an earlier stage has yet to make is as large as the model it starts from."""
    starts: dict[str, str] = {}
    for stage, config in stages:
        for name, value in vars(config).items():
            setattr(config, name, _follow(value, starts))
        final = Path(config.output_dir) / "final"
        if not final.exists():
            starts[str(final)] = config.model_name_or_path
        yield stage, config


def _follow(value: Any, moved: dict[str, str]) -> Any:
    """Replace the folders that moved, in a path, a list of paths or a list of rewards."""
    if isinstance(value, list):
        return [_follow(part, moved) for part in value]
    if isinstance(value, dict):
        return {name: _follow(part, moved) for name, part in value.items()}
    if isinstance(value, str):
        for old, new in moved.items():
            if value == old or value.startswith(old.rstrip("/") + "/"):
                return new + value[len(old.rstrip("/")) :]
    return value
