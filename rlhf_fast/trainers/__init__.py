"""The three steps of alignment, each a loop that reads top to bottom."""

from rlhf_fast.config import PPOConfig, RewardConfig, SFTConfig, TrainerConfig
from rlhf_fast.trainers.ppo import PPOTrainer
from rlhf_fast.trainers.reward import RewardTrainer
from rlhf_fast.trainers.sft import SFTTrainer

CONFIGS: dict[str, type[TrainerConfig]] = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}
TRAINERS = {"sft": SFTTrainer, "reward": RewardTrainer, "ppo": PPOTrainer}

__all__ = ["CONFIGS", "TRAINERS", "PPOTrainer", "RewardTrainer", "SFTTrainer"]
