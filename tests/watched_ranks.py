"""Run by test_watchdog.py on two ranks: PPO whose reward is slow, raises, or kills its process, on one rank alone."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rlhf_fast import PPOConfig, PPOTrainer
from rlhf_fast.distributed import init_distributed


def main(model: str, data: str, folder: Path, fault: str) -> None:
    world = init_distributed("cpu")

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        if world.rank == 1:
            if fault == "slow":
                time.sleep(8)  # several signs of life beyond the others' patience, on a busy machine too
            elif fault == "raises":
                raise RuntimeError("the reward of rank 1 is broken")
            elif fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault == "stopped":  # alive for the launcher, silent for the others
                os.kill(os.getpid(), signal.SIGSTOP)
        return [float(len(text)) for text in completions]

    config = PPOConfig(
        model_name_or_path=model,
        train_data=data,
        output_dir=str(folder),
        batch_size=4,
        max_new_tokens=4,
        max_steps=1,
        rank_timeout=1.5,
        report_to=[],
    )
    PPOTrainer(config, reward=reward).train()


if __name__ == "__main__":
    if sys.argv[4] == "stopped":
        from rlhf_fast import watchdog

        watchdog.SILENCE = 5.0
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4])
