"""A policy over ten letters: small enough that the best answer is known and PPO finds it in seconds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast.models import load_scalar_model, load_tokenizer, save_model

LETTERS = "abcdefxy"


def save_letters_model(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A Llama whose vocabulary is a pad token, an end token and eight letters, one token each."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<end>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocab),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    model.to(dtype).save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: Iterable[object]) -> str:
    """Write rows as JSON Lines; returns the path as a config takes it."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def count_a(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward, of which the best answer is nothing but a."""
    return [float(text.count("a")) for text in completions]


COUNT_A = f"{__file__}:count_a"  # as a config names it


def ppo_settings(model: Path, folder: Path, *, prompts: Iterable[str] = LETTERS, **fields: Any) -> dict[str, Any]:
    """Fields of a short PPO run on prompts of some letters, to `folder`/run; `fields` are more, or others instead."""
    settings = {
        "model_name_or_path": str(model),
        "train_data": write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts]),
        "output_dir": str(folder / "run"),
        "batch_size": 8,
        "max_new_tokens": 6,
        "report_to": [],
    }
    return settings | fields


MEASURED = ("time/", "perf/", "memory/")  # what the clock says differs; all else must not


def repeatable_metrics(folder: Path) -> list[dict[str, float]]:
    """Rows of a run's metrics.jsonl without what was measured: the same run again has the same."""
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in read_metrics(folder)]


@pytest.fixture(scope="session")
def letters_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a policy over ten letters."""
    return save_letters_model(tmp_path_factory.mktemp("letters") / "model")


@pytest.fixture(scope="session")
def reward_model(letters_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a reward model that reads those letters, with a random head."""
    torch.manual_seed(1)
    model = load_scalar_model(letters_model, dtype="float32")
    torch.nn.init.normal_(model.score.weight)
    folder = tmp_path_factory.mktemp("reward") / "judge"
    save_model(model, load_tokenizer(letters_model), folder)
    return folder
