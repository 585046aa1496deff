"""load_reward: from the config's `reward` field to something that scores."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_fast.distributed import World
from rlhf_fast.errors import RewardError

from .base import Reward
from .combine import WeightedSum
from .function import FunctionReward
from .http import HTTPReward
from .loading import find_function
from .model import ModelReward
from .sources import FORMS, RewardSource, is_url, reward_sources


def load_reward(
    spec: str | list[dict[str, Any]] | Callable[..., Any],
    *,
    timeout: float = 300.0,
    device: str = "cpu",
    offload: bool = False,
    split: World | None = None,
    base_dir: str | Path | None = None,
) -> Reward:
    """A reward from "file.py:name", "package.module:name", a model folder, an http(s) URL, a callable, or a list.

    A list has mappings with source, weight (1) and name: the total is the weighted sum. timeout: seconds for one batch,
    0 for no limit. device: where a reward model runs; offload: its weights are there only while it does; split:
    each rank of that world holds a part of them, and Reward.gathered() is entered around score(). Relative paths start
    at base_dir, by default the current directory.

    Raises ConfigError when the list's form is wrong, RewardError when a source cannot be loaded.
    """
    folder = Path(base_dir) if base_dir is not None else Path.cwd()
    sources = reward_sources(spec)
    rewards = [_load(source, timeout if timeout > 0 else None, device, offload, split, folder) for source in sources]
    if len(rewards) == 1 and sources[0].weight == 1:
        return rewards[0]
    return WeightedSum(rewards, [source.weight for source in sources])


def _load(
    entry: RewardSource, timeout: float | None, device: str, offload: bool, split: World | None, folder: Path
) -> Reward:
    source = entry.source
    if not isinstance(source, str):
        return FunctionReward(source, name=entry.name, timeout=timeout)
    if is_url(source):
        return HTTPReward(source, name=entry.name, timeout=timeout)
    path = folder / Path(source).expanduser()
    if path.is_dir():
        return ModelReward(path, name=entry.name, device=device, offload=offload, split=split)
    if ":" in source:
        function, file = find_function(source, folder)
        return FunctionReward(function, name=entry.name, label=source, file=file, timeout=timeout)
    if source.endswith(".py"):
        names = re.findall(r"^(?:async )?def ([a-z]\w*)", path.read_text("utf-8"), re.M) if path.is_file() else []
        found = f"; it has {', '.join(names)}" if names else ""
        raise RewardError(f"reward {source}: which function? Write {source}:NAME{found}.")
    raise RewardError(f"reward {source}: no such folder in {folder.resolve()}; {FORMS}.")
