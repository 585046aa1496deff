"""What a resumed run may change in its config. Everything else would make it another run, and is refused by name."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from rlhf_fast.config import TrainerConfig
from rlhf_fast.errors import ConfigError

from .load import CLASSES, load_config
from .rules import raise_problems
from .values import shown
from .yaml_file import read_yaml

# Every field of every config is in one of the two tables; a test holds that. A text is said as a warning.
NOT_BIT_FOR_BIT = "the run goes on, but sums round in another order than in the run never cut"
NEW_SCHEDULE = "warm-up and decay of the learning rate are spread over the new length"
NOT_COMPARABLE = "evaluations before and after this step are of other prompts"
MAY_CHANGE: dict[str, str] = {
    "output_dir": "",
    "max_steps": NEW_SCHEDULE,
    "num_train_epochs": NEW_SCHEDULE,
    "eval_steps": "",
    "save_steps": "",
    "save_total_limit": "",
    "on_save_error": "",
    "max_nonfinite_steps": "",
    "skip_grad_norm": "",
    "on_bad_reward": "",
    "report_to": "",
    "rank_timeout": "",
    "run_name": "",
    "trust_remote_code": "",
    "reward_timeout": "",
    "num_sample_rows": "",
    "nvme_path": "",
    "offload_ref": "",
    "offload_reward": "",
    "reward_zero_stage": "",
    "eval_data": NOT_COMPARABLE,
    "num_eval_prompts": NOT_COMPARABLE,
    "micro_batch_tokens": NOT_BIT_FOR_BIT,
    "padding_free": NOT_BIT_FOR_BIT,
    "rollout_batch_size": NOT_BIT_FOR_BIT,
    "rollout_backend": NOT_BIT_FOR_BIT,
    "gradient_checkpointing": NOT_BIT_FOR_BIT,
    "ops_backend": NOT_BIT_FOR_BIT,
    "ref_zero_stage": NOT_BIT_FOR_BIT,
}

OTHER_DATA = "the checkpoint's place in the data would be another"
OTHER_MODEL = "the checkpoint holds the weights of the old one"
OTHER_LAYOUT = "the checkpoint's optimizer state is laid out for the old one"
OTHER_METHOD = "the steps before and after would be of two different trainings"
MAY_NOT_CHANGE: dict[str, str] = {
    name: reason
    for reason, names in (
        (
            OTHER_DATA,
            """train_data system_prompt chat_template on_bad_row max_length max_prompt_length batch_size num_generations
            seed packing completion_only_loss unsup_data""",
        ),
        (
            OTHER_MODEL,
            """model_name_or_path ref_model_path value_model value_model_path use_peft lora_r lora_alpha lora_dropout
            lora_target_modules use_rslora enable_ema""",
        ),
        (OTHER_LAYOUT, "dtype zero_stage value_zero_stage offload_optimizer offload_param"),
        (
            OTHER_METHOD,
            """learning_rate lr_scheduler_type warmup_ratio weight_decay adam_beta1 adam_beta2 adam_epsilon
            max_grad_norm center_rewards_coefficient reward missing_eos_penalty clip_score normalize_scores
            value_learning_rate max_new_tokens min_new_tokens temperature top_p top_k min_p repetition_penalty
            stop_token_ids semantics num_ppo_epochs num_mini_batches gamma lam cliprange cliprange_high dual_clip
            cliprange_value vf_coef entropy_coef whiten_advantages whiten_rewards kl_coef kl_in kl_estimator kl_target
            kl_horizon target_kl ema_decay unsup_coef critic_warmup""",
        ),
    )
    for name in names.split()
}


def config_differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Field -> (old value, new value) where they differ; a field that one of them lacks is None there."""
    names = [*old, *(name for name in new if name not in old)]
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def check_resume(old_config_file: str | Path, new_config: TrainerConfig) -> None:
    """Raises ConfigError if a run begun with the old file cannot go on with the new config; names each field and why.

    Warns about changes that are allowed but leave a trace.
    """
    cls = type(new_config)
    names = {field.name for field in dataclasses.fields(cls)}
    keys = set(read_yaml(old_config_file))
    if not keys <= names:
        for other in CLASSES:
            if keys <= {field.name for field in dataclasses.fields(other)}:
                raise ConfigError(
                    f"{old_config_file}: this run was made with a {other.__name__}, it cannot go on with a "
                    f"{cls.__name__}. Choose another output_dir."
                )
    try:
        old_config = load_config(cls, Path(old_config_file))
    except ConfigError as error:
        raise ConfigError(f"cannot resume with the config that the run's folder holds: {error}") from error
    differences = config_differences(dataclasses.asdict(old_config), dataclasses.asdict(new_config))
    refused = [
        f"{name}: was {shown(old)}, is {shown(new)}: {MAY_NOT_CHANGE[name]}."
        for name, (old, new) in differences.items()
        if name not in MAY_CHANGE
    ]
    if refused:
        refused[-1] += f" Resume with the values in {old_config_file}, or start a new run in another output_dir."
    raise_problems(refused)
    for name, (old, new) in differences.items():
        if MAY_CHANGE[name]:
            warnings.warn(f"{name}: was {shown(old)}, is {shown(new)}: {MAY_CHANGE[name]}.", stacklevel=2)
