"""What a run is made of: one flat dataclass a trainer. Loading, overrides and messages are in config_loading.py.

Names follow TRL and transformers' TrainingArguments where they have one. Every constant of the method is a field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Dtype = Literal["float32", "bfloat16", "float16", "float64"]  # float64: to check the maths, slow
KLEstimator = Literal["k1", "k2", "k3"]


@dataclass(kw_only=True)
class TrainerConfig:
    """What all three trainers share."""

    # Model and data
    model_name_or_path: str  # a folder that AutoModelForCausalLM loads
    train_data: str | list[str]  # .jsonl, .parquet or a folder written by datasets.save_to_disk; several are joined
    eval_data: str | list[str] | None = None  # held out: never trained on
    output_dir: str = "runs/run"
    system_prompt: str | None = None  # put before every conversation that has no system message of its own
    chat_template: str | None = None  # a Jinja template or a file that holds one; default: the tokenizer's own
    on_bad_row: Literal["error", "skip"] = "error"  # skipped rows are counted and reported
    max_length: int = 512  # tokens of one sequence; longer ones are cut at the end (SFT, unsup_data) or bad (reward)
    trust_remote_code: bool = False  # run Python code found in the model's folder

    # LoRA: train low-rank adapters beside linear layers instead of the weights (Hu et al. 2021)
    use_peft: bool = False
    lora_r: int = 16  # rank
    lora_alpha: int = 32  # adapters count lora_alpha / lora_r, or lora_alpha / sqrt(lora_r) with use_rslora
    lora_dropout: float = 0.0  # 0 alone: dropout is off everywhere
    lora_target_modules: str | list[str] | None = None  # names, all-linear or a pattern; None: PEFT's usual choice
    use_rslora: bool = False

    # Optimiser
    learning_rate: float = 1e-5
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    warmup_ratio: float = 0.03  # of all optimiser steps
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    skip_grad_norm: float | None = None  # a step whose gradient norm, before clipping, is larger is dropped: a spike
    num_train_epochs: float = 1.0  # over train_data; max_steps, when set, decides instead
    max_steps: int | None = None
    batch_size: int = 32  # rows of one step, over all ranks
    micro_batch_tokens: int = 4096  # of one forward and backward on one rank, padding included where there is some
    padding_free: bool = True  # sequences end to end, without padding, if the model's attention can; same results
    gradient_checkpointing: bool = False

    # Engine; what is offloaded has not run on a GPU yet: docs/scaling.md
    dtype: Dtype = "float32"
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: bool = False  # optimiser state and step on the CPU; needs zero_stage 1, 2 or 3
    offload_param: bool = False  # weights in the CPU's memory, fetched layer by layer; needs zero_stage 3
    nvme_path: str | None = None  # a folder on a fast disk: what these two offload goes into files there
    ops_backend: Literal["auto", "reference"] = "auto"  # auto: kernels where there are any; reference: plain PyTorch

    # The run
    seed: int = 0
    eval_steps: int | None = None  # evaluate every so many steps; None: before and after training only
    save_steps: int | None = None  # checkpoint every so many steps; None: no checkpoint, only final/
    save_total_limit: int = 2  # checkpoints kept, besides the best one
    on_save_error: Literal["error", "continue"] = "error"  # continue: train on without the checkpoint; one process only
    max_nonfinite_steps: int = 3  # steps in a row dropped for NaN, infinity or a spike before the run stops
    rank_timeout: float = 600.0  # seconds that other ranks wait for one before it is named, with its phase, on stderr
    report_to: list[Literal["tensorboard", "wandb"]] = field(default_factory=lambda: ["tensorboard"])
    run_name: str | None = None  # in wandb and the report; default: the name of output_dir


@dataclass(kw_only=True)
class SFTConfig(TrainerConfig):
    """Supervised fine-tuning on prompt + completion or messages."""

    learning_rate: float = 2e-5
    completion_only_loss: bool = True  # train on completions (assistant turns) only
    packing: bool = False  # rows of batch_size are packs of examples, max_length tokens together


@dataclass(kw_only=True)
class RewardConfig(TrainerConfig):
    """A reward model from preference pairs: Bradley-Terry, -log sigmoid(r_chosen - r_rejected - margin)."""

    center_rewards_coefficient: float = 0.0  # adds coefficient * (r_chosen + r_rejected)^2 (Eisenstein et al. 2023)


@dataclass(kw_only=True)
class PPOConfig(TrainerConfig):
    """Proximal policy optimisation. Formulas: rlhf_fast/ops and docs/ppo.md."""

    learning_rate: float = 1e-6
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"

    # Rewards: "file.py:name", "package.module:name", a model folder, an http(s) URL, or a list of
    # {"source": ..., "weight": ..., "name": ...}
    reward: str | list[dict[str, Any]] = ""
    reward_timeout: float = 300.0  # seconds for one batch, then an error; no limit: 0
    on_bad_reward: Literal["error", "skip"] = "error"  # skip: a batch whose reward fails or is not finite is dropped
    missing_eos_penalty: float = 0.0  # subtracted from the score of a completion cut by max_new_tokens
    clip_score: float | None = None  # scores are clipped to +- this
    normalize_scores: bool = False  # to mean 0, deviation 1 over the rollout, before clipping

    # Other models; None means model_name_or_path
    ref_model_path: str | None = None  # with use_peft None is the policy with its adapters off
    value_model: Literal["separate", "shared"] = "separate"  # a model of its own, or a head on the policy's trunk
    value_model_path: str | None = None  # a reward model's folder is a good start
    value_learning_rate: float | None = None  # None: learning_rate
    value_zero_stage: Literal[0, 1, 2, 3] | None = None  # of a separate value model; None: zero_stage
    critic_warmup: int = 0  # steps at the beginning in which a separate value model learns and the policy does not
    ref_zero_stage: Literal[0, 3] | None = None  # 3: each rank holds a part of its weights; None: 3 with zero_stage 3

    offload_ref: bool = False  # the reference's weights on the CPU except while it is asked
    offload_reward: bool = False  # the same of reward models
    reward_zero_stage: Literal[0, 3] = 0  # 3: each rank holds a part of a reward model, and all of it while it scores

    # Rollout: batch_size completions a step, num_generations for each prompt
    num_generations: int = 1
    max_prompt_length: int = 256
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # other than 1 is refused: log-probs would not be the policy's
    stop_token_ids: list[int] | None = None  # besides EOS
    rollout_batch_size: int = 64  # completions decoded at once on one rank
    rollout_backend: Literal["auto", "cpp", "cuda", "transformers"] = "auto"  # auto: ours where it can

    # PPO
    semantics: Literal["default", "dschat"] = "default"  # dschat: DeepSpeed-Chat's formulas, to migrate
    num_ppo_epochs: int = 1
    num_mini_batches: int = 1  # optimiser steps an epoch
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_high: float | None = None
    dual_clip: float | None = None
    cliprange_value: float | None = 0.2
    vf_coef: float = 0.1  # weight of the value loss on a shared trunk; separate models do not mix
    entropy_coef: float = 0.0
    whiten_advantages: bool = True
    whiten_rewards: bool = False  # variance only, the mean stays
    kl_coef: float = 0.05  # 0: no reference model
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: KLEstimator | None = None  # None: k1 in the reward, k2 in the loss
    kl_target: float | None = (
        None  # per-sequence KL that an adaptive kl_coef steers to (Ziegler et al. 2019); None: fixed
    )
    kl_horizon: int = 10000  # completions over which the controller acts
    unsup_coef: float = 0.0  # weight of the cross-entropy of unsup_data in the policy's loss (PPO-ptx); 0: none
    unsup_data: str | list[str] | None = None  # rows with text, prompt + completion or messages, cut at max_length
    enable_ema: bool = False  # average the policy's weights over the optimiser steps; written as final_ema/ too
    ema_decay: float = 0.992  # of that average: average <- decay * average + (1 - decay) * weights; fp32
    target_kl: float | None = None  # a mini-batch whose approx_kl exceeds it ends the step's updates
    num_eval_prompts: int = 64  # of eval_data
    num_sample_rows: int = 4  # rollout rows written to samples.jsonl a step
