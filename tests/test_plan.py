"""The memory plan of folders that are not plain causal language models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_fast.config import PPOConfig
from rlhf_fast.errors import ModelError
from rlhf_fast.plan import memory_plan

REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def plan_of(model: Path, **fields: object) -> str:
    return str(memory_plan(PPOConfig(model_name_or_path=str(model), train_data="d", **fields)))  # type: ignore[arg-type]


def test_a_reward_may_be_any_classifier(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import BertConfig

    BertConfig(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, architectures=["BertForSequenceClassification"]
    ).save_pretrained(tmp_path / "bert")
    (line,) = (line for line in plan_of(tiny_llama, reward=str(tmp_path / "bert")).splitlines() if "bert" in line)
    assert line.split()[2:4] == ["0.20", "GB"]  # 50 million parameters in fp32
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
