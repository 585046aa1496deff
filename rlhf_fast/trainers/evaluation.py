"""Score a policy on held-out prompts, without training: what `rlhf-fast eval` prints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlhf_fast.config import PPOConfig
from rlhf_fast.config_loading import check_paths
from rlhf_fast.data import ChatFormat, load_rows, prompt_dataset
from rlhf_fast.distributed import init_distributed
from rlhf_fast.errors import ConfigError
from rlhf_fast.generation import Generator
from rlhf_fast.models import check_vocabulary, context_length, load_causal_lm, load_tokenizer
from rlhf_fast.rewards import load_reward
from rlhf_fast.trainers.experience import sample, score


def evaluate_policy(config: PPOConfig, model_path: str) -> dict[str, float]:
    """Complete the first num_eval_prompts of eval_data with the policy in a folder and score them.

    Returns scores, scores_std, scores_stderr (standard error of the mean), mean_length (tokens), eos_rate, distinct_2
    and rewards/NAME for each part of the reward.
    """
    if config.eval_data is None:
        raise ConfigError("eval_data: not set; name the held-out prompts to evaluate on")
    unread: dict[str, Any] = {"train_data": [], "ref_model_path": None, "value_model_path": None}
    check_paths(replace(config, model_name_or_path=model_path, **unread))
    world, code = init_distributed(), config.trust_remote_code
    tokenizer = load_tokenizer(model_path, trust_remote_code=code)
    chat = ChatFormat(tokenizer, system_prompt=config.system_prompt, chat_template=config.chat_template)
    rows = load_rows(config.eval_data, kind="prompt", on_bad_row=config.on_bad_row)
    context = context_length(model_path, trust_remote_code=code)
    prompts = prompt_dataset(rows, chat, max_prompt_length=config.max_prompt_length, context=context)
    model = load_causal_lm(model_path, dtype=config.dtype, trust_remote_code=code).to(world.device)
    check_vocabulary(model, tokenizer)
    generator = Generator(
        model,
        tokenizer,
        backend=config.rollout_backend,
        max_batch_size=config.rollout_batch_size,
        ops_backend=config.ops_backend,
    )
    reward = load_reward(
        config.reward,
        timeout=config.reward_timeout,
        device=str(world.device),
        offload=config.offload_reward,
        split=world if config.reward_zero_stage == 3 else None,
    )
    mine = prompts[: config.num_eval_prompts][world.rank :: world.world_size]
    rollout = sample(generator, mine, config, chat=chat, step=0, world=world)
    return score(reward, tokenizer, mine, rollout).metrics(world)
