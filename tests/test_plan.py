"""The memory plan of folders that are not plain causal language models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.config import PPOConfig
from rlhf_fast.errors import ModelError
from rlhf_fast.plan import memory_plan, ppo_lines
from rlhf_fast.training_memory import Shape

REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def plan_of(model: Path, **fields: object) -> str:
    return str(memory_plan(PPOConfig(model_name_or_path=str(model), train_data="d", **fields)))  # type: ignore[arg-type]


def test_a_reward_may_be_any_classifier(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig

    BertConfig(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, architectures=["BertForSequenceClassification"]
    ).save_pretrained(tmp_path / "bert")

    def size(**fields: object) -> list[str]:
        plan = plan_of(tiny_llama, reward=str(tmp_path / "bert"), **fields)
        return next(line.split()[2:4] for line in plan.splitlines() if "bert" in line)

    assert size() == ["0.20", "GB"]  # 50 million parameters in fp32
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert size(reward_zero_stage=3) == ["0.05", "GB"]
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match="model_type 'vit' has no CausalLM form"):
        plan_of(tmp_path / "bert")


def test_code_in_the_folder_is_run_only_when_asked(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    config = json.loads((tiny_llama / "config.json").read_text())
    auto_map = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": auto_map}))
    (folder / "mine.py").write_text(REMOTE_CODE)
    assert "policy" in plan_of(folder, trust_remote_code=True)
    with pytest.raises(ModelError, match="trust_remote_code"):
        plan_of(folder)


def test_what_options_of_ppo_take_and_save() -> None:
    """Bytes by hand, for a policy of 1000 weights on two GPUs."""
    sizes: dict[str, Any] = {"layers": 1, "hidden": 8, "intermediate": 16, "kv_width": 8, "vocabulary": 50}
    shape = Shape(1000, 1000, **sizes, tied=True, kept=144)
    reference = replace(shape, parameters=10_000)

    def lines(**fields: Any) -> dict[str, float]:
        config = PPOConfig(model_name_or_path="m", train_data="d", **fields)
        return {line.name: line.total for line in ppo_lines(shape, config, 2, reference=reference, on_gpu=True)}

    plain, phases = lines(), "rollout or activations"
    assert lines(enable_ema=True) == plain | {"policy's average": 4000}
    assert lines(enable_ema=True, zero_stage=1)["policy's average"] == 2000
    assert lines(enable_ema=True, dtype="bfloat16")["policy's average"] == 2000  # runs as stage 1, in fp32
    assert lines(enable_ema=True, zero_stage=2, offload_optimizer=True)["policy's average"] == 0
    long = lines(max_new_tokens=512, offload_ref=True)
    assert long == lines(max_new_tokens=512) | {"reference": 0}  # while it is asked it takes less than training does
    assert lines(ref_zero_stage=3, offload_ref=True)["reference"] == 0
    tiny = {"micro_batch_tokens": 1, "max_new_tokens": 1, "max_prompt_length": 1}
    forward = 2 * 144 * 4  # of the layer, for two tokens; the gradients of two models are not there
    assert lines(**tiny, offload_ref=True)[phases] == 4 * 10_000 + forward - 2 * 4 * 1000
    assert lines(unsup_data="t", max_length=10**4)[phases] > 2 * plain[phases]
