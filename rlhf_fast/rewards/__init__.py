"""Rewards: what scores a completion. `load_reward` makes one from what a config says; docs/rewards.md shows how.

base.py      Reward, RewardScores, and the check that what came back is one finite number a completion
sources.py   the config's `reward` field, checked, without loading anything
load.py      load_reward
function.py  a Python function, sync or async, in a file or a package; loading.py finds it
worker.py    the thread that runs a function, so that one that hangs becomes an error
model.py     a reward model's folder
http.py      a server
combine.py   several, added up with weights
"""

from .base import Reward, RewardScores
from .combine import WeightedSum
from .function import FunctionReward
from .http import HTTPReward
from .load import load_reward
from .model import ModelReward
from .sources import RewardSource, reward_sources

__all__ = [
    "FunctionReward",
    "HTTPReward",
    "ModelReward",
    "Reward",
    "RewardScores",
    "RewardSource",
    "WeightedSum",
    "load_reward",
    "reward_sources",
]
