"""Which rows go through the model together, and how many steps a run has."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Sequence

import numpy
import torch
from torch import nn

from rlhf_fast.config import PPOConfig, TrainerConfig
from rlhf_fast.data import first_fit_decreasing, token_budget_batches
from rlhf_fast.distributed import World, all_reduce_max
from rlhf_fast.errors import ConfigError
from rlhf_fast.models import set_padding_free, unwrap


def use_padding_free(config: TrainerConfig, models: Sequence[nn.Module], world: World) -> bool:
    """Let models read rows without padding, if the config says so. Warns of those that cannot; False if any."""
    if not config.padding_free:
        return False
    padded = [type(unwrap(model)).__name__ for model in models if not set_padding_free(model)]
    if padded and world.is_main:
        names = ", ".join(dict.fromkeys(padded))
        warnings.warn(f"padding_free: {names} cannot keep sequences apart; rows are padded", stacklevel=2)
    return not padded


def micro_batches(lengths: Sequence[int], budget: int, world: World, *, padding_free: bool) -> list[list[int]]:
    """Split rows into micro-batches of at most `budget` tokens; as many on every rank.

    Padding counts, so that rows go together by length; padding_free: it does not, and micro-batches are full. A rank
    that needs fewer than another makes smaller ones. With fewer rows than that it gets empty ones at the end, which it
    must run all the same (on any row, with nothing unmasked): a rank that skips a backward pass leaves the others
    waiting in a collective.
    """
    split = first_fit_decreasing if padding_free else token_budget_batches
    batches = split(lengths, budget)
    most = int(all_reduce_max(len(batches), world))
    while len(batches) < min(most, len(lengths)):
        largest = max(batches, key=len)
        batches[batches.index(largest)], rest = largest[::2], largest[1::2]
        batches.append(rest)
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
