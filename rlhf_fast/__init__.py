"""Alignment of language models from human feedback: SFT, reward model, PPO.

    from rlhf_fast import PPOConfig, PPOTrainer
    PPOTrainer(PPOConfig(model_name_or_path=..., train_data=..., reward=...)).train()

The parts stand alone too: rlhf_fast.ops (kernels), rlhf_fast.generation (Generator).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_fast.config import PPOConfig, RewardConfig, SFTConfig

if TYPE_CHECKING:
    from rlhf_fast.trainers import PPOTrainer, RewardTrainer, SFTTrainer

__version__ = "0.1.0"
__all__ = ["PPOConfig", "PPOTrainer", "RewardConfig", "RewardTrainer", "SFTConfig", "SFTTrainer"]


def __getattr__(name: str) -> Any:
    # The trainers bring transformers with them: seconds that `import rlhf_fast.ops` need not pay.
    if name in ("PPOTrainer", "RewardTrainer", "SFTTrainer"):
        from rlhf_fast import trainers

        return getattr(trainers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
