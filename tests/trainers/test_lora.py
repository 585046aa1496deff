"""LoRA from SFT to PPO: what is trained and saved, the reference without a model of its own, resume, ranks, ZeRO-3."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_fast import PPOConfig, PPOTrainer, SFTConfig, SFTTrainer
from rlhf_fast.cli import main
from rlhf_fast.models import PolicyModel

from .conftest import count_a, ppo_settings, read_metrics, repeatable_metrics, write_jsonl
from .test_split import assert_same_run, run_on, settings

LORA: dict[str, Any] = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "report_to": []}


def ppo_config(model: Path, folder: Path, **fields: Any) -> PPOConfig:
    settings = {
        "batch_size": 16,
        "num_mini_batches": 2,
        "micro_batch_tokens": 64,
        "learning_rate": 1e-2,
        "kl_coef": 0.1,
        "max_steps": 4,
    }
    return PPOConfig(**ppo_settings(model, folder, **{**settings, **LORA, **fields}))


def sft_config(model: Path, folder: Path, **fields: Any) -> SFTConfig:
    rows = [{"prompt": a, "completion": b * n} for a in "abcd" for b in "xy" for n in (1, 5)]
    settings = {
        "model_name_or_path": str(model),
        "train_data": write_jsonl(folder / "train.jsonl", rows),
        "output_dir": str(folder / "run"),
        "batch_size": 8,
        "learning_rate": 1e-2,
        "max_steps": 6,
    }
    return SFTConfig(**{**settings, **LORA, **fields})


def adapters_of(folder: Path, final: str = "final") -> dict[str, torch.Tensor]:
    return load_file(folder / final / "adapter_model.safetensors")


def resumed_equals_uninterrupted(trainer: type, config: Any) -> list[Path]:
    """Runs it, then once more from its first checkpoint; returns the checkpoint's files."""
    run = Path(config.output_dir)
    trainer(config).train()
    whole, rows = adapters_of(run), repeatable_metrics(run)
    (first,) = (run / "checkpoints").glob("step-3")
    for name in ("final", "finished", "checkpoints/step-6"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    files = [path for path in first.rglob("*") if path.is_file()]
    trainer(config, resume=True).train()
    again = adapters_of(run)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert repeatable_metrics(run) == rows
    return files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sft_trains_adapters_and_goes_on_with_the_same_bits(dtype: str, letters_model: Path, tmp_path: Path) -> None:
    files = resumed_equals_uninterrupted(
        SFTTrainer, sft_config(letters_model, tmp_path, dtype=dtype, save_steps=3, gradient_checkpointing=True)
    )
    for file in files:
        if file.name.endswith("_model_states.pt"):
            names = torch.load(file, weights_only=False)["module"]
            assert names
            assert all("lora_" in name for name in names)  # no frozen weight, under none of its names
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final", dtype="float32").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(letters_model).state_dict().items():
        kept = final.get(name, final.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(kept, tensor)


@pytest.mark.parametrize("value_model", ["separate", "shared"])
def test_ppo_goes_on_with_the_same_bits(value_model: str, letters_model: Path, tmp_path: Path) -> None:
    config = ppo_config(
        letters_model, tmp_path, value_model=value_model, max_steps=6, save_steps=3, kl_target=1.0, enable_ema=True
    )
    files = resumed_equals_uninterrupted(PPOWithA, config)
    (average,) = (torch.load(file, weights_only=True) for file in files if file.name == "ema-0.pt")
    adapters = adapters_of(tmp_path / "run", "final_ema")
    head = 33 if value_model == "shared" else 0  # the value head's weights on a hidden size of 32
    assert sum(tensor.numel() for tensor in average) == sum(tensor.numel() for tensor in adapters.values()) + head
    assert any(not torch.equal(tensor, adapters[name]) for name, tensor in adapters_of(tmp_path / "run").items())
    assert (tmp_path / "run" / "final" / "value_head.safetensors").exists() == (value_model == "shared")


class PPOWithA(PPOTrainer):
    def __init__(self, config: PPOConfig, *, resume: bool = False) -> None:
        super().__init__(config, reward=count_a, resume=resume)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value_model", ["separate", "shared"])
def test_the_reference_is_the_policy_without_adapters(
    value_model: str, dtype: str, letters_model: Path, tmp_path: Path
) -> None:
    """The same run with the model loaded once more as the reference has the same metrics."""
    fields = {"value_model": value_model, "dtype": dtype, "num_ppo_epochs": 2}
    trainer = PPOWithA(ppo_config(letters_model, tmp_path, **fields))
    assert trainer.models.reference is None
    models = [m for m in (trainer.models.policy_module, trainer.models.critic_module) if m is not None]
    assert sum(isinstance(m, PolicyModel) for m in models) <= 1
    trainer.train()
    assert trainer.generator.stats.backend == "cpp"
    rows = read_metrics(tmp_path / "run")
    assert abs(rows[0]["objective/kl"]) < 1e-5
    assert abs(rows[-1]["objective/kl"]) > 0.01  # an estimate, which may be negative
    if dtype == "float32":
        assert all(row["rollout/logprob_drift_max"] < 1e-4 for row in rows)

    other = PPOWithA(
        ppo_config(
            letters_model, tmp_path, **fields, ref_model_path=str(letters_model), output_dir=str(tmp_path / "two")
        )
    )
    assert other.models.reference is not None
    other.train()
    for a, b in zip(rows, read_metrics(tmp_path / "two"), strict=True):
        for name in ("objective/kl", "objective/scores", "loss/policy_avg", "loss/value_avg", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6)


def test_without_kl_nothing_is_switched_off(letters_model: Path, tmp_path: Path) -> None:
    trainer = PPOWithA(ppo_config(letters_model, tmp_path, kl_coef=0.0, max_steps=1))
    assert not trainer.models.reference_is_policy
    trainer.train()
    assert "objective/kl" not in read_metrics(tmp_path / "run")[0]


def test_two_ranks_with_zero_3_are_the_run_of_one(letters_model: Path, tmp_path: Path) -> None:
    config = settings(letters_model, tmp_path, max_steps=1) | LORA | {"learning_rate": 1e-2, "micro_batch_tokens": 32}
    run_on(1, tmp_path / "one", [0], config)
    run_on(2, tmp_path / "two", [3], config | {"gradient_checkpointing": True})
    assert_same_run(tmp_path / "one", tmp_path / "two", 3, of=0)
    one, two = (adapters_of(tmp_path / run) for run in ("one/stage-0", "two/stage-3"))
    assert one.keys() == two.keys()


def test_a_pipeline_of_adapters(
    letters_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage starts from the adapters of the one before; generate, eval and export read them, too."""
    monkeypatch.chdir(tmp_path)
    common = {**LORA, "batch_size": 8, "max_steps": 2, "learning_rate": 1e-2}
    rows = [{"prompt": a, "completion": "x" * n} for a in "abcd" for n in (1, 5)]
    pairs = [{"prompt": a, "chosen": "x" * n, "rejected": "y"} for a in "abcd" for n in (1, 5)]
    stages: dict[str, dict[str, Any]] = {
        "sft": {"model_name_or_path": str(letters_model), "train_data": write_jsonl(Path("t.jsonl"), rows)},
        "reward": {"model_name_or_path": "runs/sft/final", "train_data": write_jsonl(Path("p.jsonl"), pairs)},
        "ppo": {
            "model_name_or_path": "runs/sft/final",
            "value_model_path": "runs/reward/final",
            "reward": "runs/reward/final",
            "train_data": write_jsonl(Path("q.jsonl"), [{"prompt": p} for p in "abcd"]),
            "eval_data": write_jsonl(Path("e.jsonl"), [{"prompt": p} for p in "xy"]),
            "max_new_tokens": 4,
        },
    }
    for stage, fields in stages.items():
        Path(f"{stage}.yaml").write_text(yaml.safe_dump({**common, **fields, "output_dir": f"runs/{stage}"}))
    Path("pipeline.yaml").write_text("sft: sft.yaml\nreward: reward.yaml\nppo: ppo.yaml\n")
    assert main(["pipeline", "--config", "pipeline.yaml", "--dry_run"]) == 0
    plans = capsys.readouterr().out
    assert "reference" not in plans  # it is the policy
    assert main(["pipeline", "--config", "pipeline.yaml"]) == 0
    assert main(["export", "--model", "runs/ppo/final", "--output_dir", "whole"]) == 0
    capsys.readouterr()

    said = []
    for model in ("runs/ppo/final", "whole"):
        assert main(["generate", "--model", model, "--prompt", "ab", "temperature=0", "max_tokens=5"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0].pop("logprob") == pytest.approx(said[1].pop("logprob"), abs=1e-4)
    assert said[0] == said[1]
    assert main(["eval", "--config", "ppo.yaml"]) == 0
    assert "scores" in json.loads(capsys.readouterr().out)
    AutoModelForCausalLM.from_pretrained("whole")
