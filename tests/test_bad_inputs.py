"""Bad inputs, each with the message that a user gets. All through the command line, on real files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from rlhf_fast.checkpoint import verify_checkpoint
from rlhf_fast.cli import main
from tests.trainers.conftest import read_metrics, save_letters_model, write_jsonl

REWARDS = """
import math

def good(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def raises(prompts, completions, **columns):
    return [1 / 0 for text in completions]

def short(prompts, completions, **columns):
    return [0.0]

def nan(prompts, completions, **columns):
    return [math.nan] * len(completions)

def text(prompts, completions, **columns):
    return ["good"] * len(completions)

def nothing(prompts, completions, **columns):
    pass

def needs_answer(completions, answer):
    return [0.0] * len(completions)

calls = 0

def fails_later(prompts, completions, **columns):
    global calls
    calls += 1
    if calls > 4:
        raise RuntimeError("the judge is gone")
    return [float(len(text)) for text in completions]

not_a_function = 3
"""


@dataclass
class Workshop:
    """A folder with a model, data, rewards, and a config that works; each case spoils one thing."""

    folder: Path
    model: Path
    config: dict[str, Any]

    def run(self, *arguments: str, command: str = "ppo") -> int:
        file = self.folder / "config.yaml"
        file.write_text(yaml.safe_dump(self.config))
        return main([command, "--config", str(file), *arguments])

    def reward(self, name: str) -> None:
        self.config["reward"] = f"{self.folder / 'rewards.py'}:{name}"

    def weights(self, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        tensors = load_file(self.model / "model.safetensors")
        change(tensors)
        save_file(tensors, self.model / "model.safetensors", metadata={"format": "pt"})

    def prompts(self, data: bytes) -> None:
        (self.folder / "prompts.jsonl").write_bytes(data)

    def extend_tokenizer(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        tokenizer.add_tokens(["z"])
        tokenizer.save_pretrained(self.model)

    def model_config(self, **fields: object) -> None:
        file = self.model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture
def workshop(letters_folder: Path, tmp_path: Path) -> Workshop:
    shutil.copytree(letters_folder, tmp_path / "model")
    (tmp_path / "rewards.py").write_text(REWARDS)
    config = {
        "model_name_or_path": str(tmp_path / "model"),
        "train_data": write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": p} for p in "abcdxy"]),
        "reward": f"{tmp_path / 'rewards.py'}:good",
        "output_dir": str(tmp_path / "run"),
        "batch_size": 4,
        "max_new_tokens": 4,
        "max_steps": 2,
        "report_to": [],
    }
    return Workshop(tmp_path, tmp_path / "model", config)


@pytest.fixture(scope="module")
def letters_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_letters_model(tmp_path_factory.mktemp("letters") / "model")


Spoil = Callable[[Workshop], object]


def _case(name: str, spoil: Spoil, status: int, *message: str) -> Any:
    return pytest.param(spoil, status, message, id=name)


def _set(**fields: object) -> Spoil:
    return lambda w: w.config.update(fields)


def _sharded(w: Workshop) -> None:
    tensors = load_file(w.model / "model.safetensors")
    names = sorted(tensors)
    (w.model / "model.safetensors").unlink()
    save_file({name: tensors[name] for name in names[:4]}, w.model / "model-1.safetensors", metadata={"format": "pt"})
    index = {name: "model-1.safetensors" if name in names[:4] else "model-2.safetensors" for name in names}
    (w.model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _pickled(w: Workshop) -> None:
    torch.save(load_file(w.model / "model.safetensors"), w.model / "pytorch_model.bin")
    (w.model / "model.safetensors").unlink()


def _truncated(w: Workshop) -> None:
    file = w.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _remote_code(w: Workshop) -> None:
    w.model_config(model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})


def _no_tokenizer(w: Workshop) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (w.model / name).unlink(missing_ok=True)


CASES = [
    # configuration
    _case("unknown key", _set(learning_rat=1), 2, "learning_rat", "learning_rate", "config.yaml"),
    _case("wrong type", _set(batch_size="many"), 2, "batch_size", "many", "whole number"),
    _case("not a choice", _set(dtype="float8"), 2, "dtype", "float8", "bfloat16"),
    _case("missing field", lambda w: w.config.pop("train_data"), 2, "train_data"),
    _case("batch does not divide", _set(num_generations=3), 2, "batch_size", "num_generations"),
    _case("greedy rollout", _set(temperature=0.0), 2, "temperature"),
    _case("repetition penalty", _set(repetition_penalty=1.2), 2, "repetition_penalty"),
    _case("k1 in the loss", _set(kl_in="loss", kl_estimator="k1"), 2, "kl_estimator", "k1"),
    _case("gamma above 1", _set(gamma=1.5), 2, "gamma", "1.5"),
    _case("no reward", _set(reward=""), 2, "reward"),
    # data
    _case("no data file", _set(train_data="nowhere.jsonl"), 2, "nowhere.jsonl"),
    _case("empty data file", lambda w: w.prompts(b""), 1, "prompts.jsonl", "no row"),
    _case("broken JSON", lambda w: w.prompts(b'{"prompt": "a"}\n{"prompt": "b"\n'), 1, "prompts.jsonl:2", "JSON"),
    _case("JSON but no object", lambda w: w.prompts(b'{"prompt": "a"}\n[1]\n'), 1, "prompts.jsonl:2"),
    _case("missing column", lambda w: w.prompts(b'{"promt": "a"}\n'), 1, "prompts.jsonl:1", "prompt", "promt"),
    _case("prompt is a number", lambda w: w.prompts(b'{"prompt": 7}\n'), 1, "prompts.jsonl:1", "prompt"),
    _case("not UTF-8", lambda w: w.prompts(b'{"prompt": "\xff\xfe"}\n'), 1, "prompts.jsonl:1", "UTF-8"),
    _case("prompts too long", _set(max_prompt_length=0), 2, "max_prompt_length"),
    _case("prompt too long", lambda w: w.prompts(b'{"prompt": "' + b"a" * 900 + b'"}\n'), 1, "prompts.jsonl:1", "256"),
    _case(
        "prompt fills the context",
        lambda w: w.prompts(b'{"prompt": "' + b"a" * 64 + b'"}\n'),
        1,
        "prompts.jsonl:1",
        "context 64",
    ),
    # model folder
    _case("no model folder", _set(model_name_or_path="meta-llama/Llama-9"), 2, "meta-llama/Llama-9"),
    _case("no config.json", lambda w: (w.model / "config.json").unlink(), 1, "config.json"),
    _case("unknown architecture", lambda w: w.model_config(model_type="llamma"), 1, "llamma"),
    _case("pickled weights", _pickled, 1, "pytorch_model.bin", "safetensors"),
    _case("missing shard", _sharded, 1, "model-2.safetensors"),
    _case("truncated weights", _truncated, 1, "model.safetensors"),
    _case("missing weight", lambda w: w.weights(lambda t: t.pop("model.norm.weight")), 1, "model.norm.weight"),
    _case("wrong shape", lambda w: w.model_config(intermediate_size=48), 1, "64", "48"),
    _case("remote code", _remote_code, 1, "trust_remote_code"),
    _case("tokenizer too large", lambda w: w.extend_tokenizer(), 1, "token ids up to 10", "embedding"),
    _case("no tokenizer", _no_tokenizer, 1, "tokenizer"),
    # rewards
    _case("no reward file", _set(reward="nowhere.py:f"), 2, "nowhere.py"),
    _case("no such function", lambda w: w.reward("godo"), 1, "godo", "good"),
    _case("not a function", lambda w: w.reward("not_a_function"), 1, "not_a_function"),
    _case("reward raises", lambda w: w.reward("raises"), 1, "rewards.py", "raises", "ZeroDivisionError"),
    _case("reward too short", lambda w: w.reward("short"), 1, "rewards.py:short", "1 score", "4 completions"),
    _case("reward is NaN", lambda w: w.reward("nan"), 1, "rewards.py:nan", "nan", "row 0"),
    _case("reward is text", lambda w: w.reward("text"), 1, "rewards.py:text", "'good'", "row 0"),
    _case("reward returns None", lambda w: w.reward("nothing"), 1, "rewards.py:nothing", "None"),
    _case("reward wants a column", lambda w: w.reward("needs_answer"), 1, "needs_answer", "answer"),
    _case("nobody at the URL", _set(reward="http://127.0.0.1:9/score", reward_timeout=2.0), 1, "127.0.0.1:9"),
    # disk
    _case("output_dir is a file", lambda w: (w.folder / "run").write_text(""), 2, "output_dir", "run"),
]


@pytest.mark.parametrize(("spoil", "status", "message"), CASES)
def test_bad_input_is_named_and_nothing_is_trained(
    spoil: Spoil, status: int, message: tuple[str, ...], workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(workshop)
    assert workshop.run() == status
    errors = capsys.readouterr().err
    for part in message:
        assert re.search(re.escape(part), errors, re.IGNORECASE), f"{part!r} is not in: {errors}"
    assert "Traceback" not in errors
    run = workshop.folder / "run"
    assert not (run / "final").exists()
    assert not (run / "metrics.jsonl").exists() or not read_metrics(run)


@pytest.mark.parametrize("command", ["sft", "reward", "ppo"])
def test_sequences_longer_than_the_learned_positions(
    command: str, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    config = GPT2Config(vocab_size=10, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(workshop.folder / "gpt2")
    AutoTokenizer.from_pretrained(workshop.model).save_pretrained(workshop.folder / "gpt2")
    row = {"prompt": "ab" * 6, "completion": "abcd", "chosen": "abcd", "rejected": "a"}  # 17 tokens with the end
    workshop.config |= {"train_data": write_jsonl(workshop.folder / "rows.jsonl", [row])}
    if command == "ppo":  # the policy has room for 64
        workshop.config |= {"value_model_path": str(workshop.folder / "gpt2"), "max_new_tokens": 5}
    else:
        workshop.config["model_name_or_path"] = str(workshop.folder / "gpt2")
        workshop.config = {k: v for k, v in workshop.config.items() if k not in ("reward", "max_new_tokens")}
    assert workshop.run(command=command) == 2
    errors = capsys.readouterr().err
    assert "has learned 16 positions, the longest sequence has 17 tokens" in errors
    assert ("max_new_tokens" if command == "ppo" else "lower max_length") in errors
    assert not (workshop.folder / "run").exists()


def test_the_unspoilt_workshop_runs(workshop: Workshop) -> None:
    assert workshop.run() == 0
    assert (workshop.folder / "run" / "final" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ppo", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["pipeline", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["generate", "--model", "nowhere"], "--prompt"),
    ],
)
def test_bad_usage_exits_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["pppo"], [], ["ppo"], ["ppo", "--config", "a.yaml", "--no_such_flag"]])
def test_unknown_commands_and_flags_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


def test_override_without_a_value(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert workshop.run("max_steps") == 2
    assert "max_steps" in capsys.readouterr().err


def test_a_reward_that_fails_later_leaves_a_good_checkpoint(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    workshop.config |= {"max_steps": 8, "save_steps": 2}
    workshop.reward("fails_later")
    assert workshop.run() == 1
    assert "the judge is gone" in capsys.readouterr().err
    verify_checkpoint(workshop.folder / "run" / "checkpoints" / "step-4")
    rewards = workshop.folder / "rewards.py"
    rewards.write_text(rewards.read_text().replace("if calls > 4", "if False"))
    assert workshop.run("--resume") == 0
    assert [row["step"] for row in read_metrics(workshop.folder / "run")] == list(range(1, 9))


def test_resume_refuses_another_model(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workshop.config["save_steps"] = 1
    assert workshop.run() == 0
    workshop.config["model_name_or_path"] = str(shutil.copytree(workshop.model, tmp_path / "other"))
    assert workshop.run("--resume", "max_steps=4") == 2
    assert "model_name_or_path" in capsys.readouterr().err


def test_resume_refuses_when_every_checkpoint_is_damaged(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    workshop.config["save_steps"] = 1
    assert workshop.run() == 0
    for folder in (workshop.folder / "run" / "checkpoints").glob("step-*"):
        (folder / "manifest.json").unlink()
    assert workshop.run("--resume", "max_steps=4") == 1
    assert "every checkpoint in it is damaged" in capsys.readouterr().err
    assert "step-2 is damaged: manifest.json is missing" in caplog.text
    assert len(read_metrics(workshop.folder / "run")) == 2


def test_dry_run_refuses_what_cannot_fit(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert workshop.run("--dry_run") == 0
    assert "policy" in capsys.readouterr().out
    workshop.model_config(hidden_size=65536, intermediate_size=262144, num_hidden_layers=100)
    assert workshop.run("--dry_run") == 2
    captured = capsys.readouterr()
    assert "micro_batch_tokens" in captured.err
    assert not (workshop.folder / "run").exists()
