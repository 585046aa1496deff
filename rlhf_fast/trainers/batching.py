"""Which rows go through the model together, and how many steps a run has."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy
import torch

from rlhf_fast.config import PPOConfig, TrainerConfig
from rlhf_fast.data import token_budget_batches
from rlhf_fast.distributed import World, all_reduce_max
from rlhf_fast.errors import ConfigError


def micro_batches(lengths: Sequence[int], budget: int, world: World) -> list[list[int]]:
    """Split rows into micro-batches of at most `budget` tokens, padding included; as many on every rank.

    A rank with fewer gets empty ones at the end. It must run them all the same (on any row, with nothing unmasked):
    a rank that skips a backward pass leaves the others waiting in a collective.
    """
    batches = token_budget_batches(lengths, budget) if lengths else []
    most = int(all_reduce_max(len(batches), world))
    return batches + [[] for _ in range(most - len(batches))]


def count_steps(config: TrainerConfig, rows: int, rows_per_step: int) -> int:
    """Optimiser steps (PPO: rollouts) of the whole run."""
    if rows == 0:
        raise ConfigError(f"train_data: no usable rows in {config.train_data}")
    steps = config.max_steps or max(1, math.ceil(config.num_train_epochs * rows / rows_per_step))
    if isinstance(config, PPOConfig) and config.critic_warmup >= steps:
        raise ConfigError(f"critic_warmup: in all {steps} steps of the run the policy would learn nothing; lower it")
    return steps


def check_ranks(config: TrainerConfig, world: World) -> None:
    """Raise ConfigError for what cannot work on so many ranks: a batch_size that does not divide among them."""
    rows, what = config.batch_size, "batch_size"
    if isinstance(config, PPOConfig):
        rows, what = config.batch_size // config.num_generations, "batch_size / num_generations"
    if rows % world.world_size:
        raise ConfigError(f"batch_size: {what} is {rows}, which must be a multiple of the {world.world_size} processes")
    if config.on_save_error == "continue" and world.world_size > 1:
        raise ConfigError("on_save_error: continue needs a single process: one rank that cannot save stops the others")
    mine = config.batch_size // world.world_size
    if isinstance(config, PPOConfig) and mine < config.num_mini_batches:
        raise ConfigError(
            f"num_mini_batches: {config.num_mini_batches} is more than the {mine} completions that each of the "
            f"{world.world_size} processes has a step; lower it or raise batch_size"
        )


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch alike on every rank, so that fresh heads start equal."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
