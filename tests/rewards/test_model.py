"""Reward models as rewards: the score at the last token, whatever the padding, the family and the batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rlhf_fast.errors import RewardError
from rlhf_fast.models import load_scalar_model, load_tokenizer, save_model
from rlhf_fast.rewards import ModelReward, load_reward
from tests.conftest import byte_tokenizer

PROMPTS = ["Who are you?", "a", "你好，最近怎么样？", "Tell me a long story about nothing at all."]
COMPLETIONS = ["A program.", "", "很好", "b" * 70]
CONVERSATIONS: list[Any] = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def reward_model(source: Path, folder: Path, **text_config: Any) -> Path:
    torch.manual_seed(1)
    model = load_scalar_model(source, dtype="float32")
    torch.nn.init.normal_(model.score.weight)  # a fresh head is near zero
    save_model(model, load_tokenizer(source), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | text_config))
    return folder


@pytest.fixture(scope="module")
def plain(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model(tiny_llama, tmp_path_factory.mktemp("plain") / "rm")


@pytest.fixture(scope="module")
def chat(tiny_chat_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model(tiny_chat_llama, tmp_path_factory.mktemp("chat") / "final")


@torch.no_grad()
def at_last_token(folder: Path, ids: list[int]) -> float:
    """By hand: the head on the last hidden state of one row without any padding."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return float(model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]))


def one_by_one(reward: ModelReward, prompts: list[Any]) -> list[float]:
    return [reward.score([p], [c]).total.item() for p, c in zip(prompts, COMPLETIONS, strict=True)]


def test_the_score_is_read_at_eos(plain: Path) -> None:
    tokenizer = byte_tokenizer()
    expected = [
        at_last_token(plain, [*tokenizer(p + c, add_special_tokens=False).input_ids, tokenizer.eos_token_id])
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    scores = load_reward(str(plain)).score(PROMPTS, COMPLETIONS)
    assert scores.total.tolist() == pytest.approx(expected, abs=1e-5)
    assert scores.total.std() > 0.01
    assert list(scores.parts) == ["rm"]


def test_conversations_go_through_the_reward_models_own_template(chat: Path) -> None:
    tokenizer = byte_tokenizer()
    expected = [
        at_last_token(chat, tokenizer(f"<|user|>{p}<|end|><|assistant|>{c}<|end|>", add_special_tokens=False).input_ids)
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    assert ModelReward(chat).score(CONVERSATIONS, COMPLETIONS).total.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("token_budget", [1, 100, 16384])
def test_a_ragged_batch_equals_one_by_one(plain: Path, token_budget: int) -> None:
    reward = ModelReward(plain, token_budget=token_budget)
    batch = reward.score(PROMPTS, COMPLETIONS).total.tolist()
    assert batch == pytest.approx(one_by_one(reward, PROMPTS), abs=1e-5)


@pytest.mark.parametrize("pad_token_id", [None, "eos"])
def test_a_model_that_pads_with_eos_or_not_at_all(tiny_llama: Path, tmp_path: Path, pad_token_id: str | None) -> None:
    """transformers takes the EOS that ends a row for padding then, or refuses batches."""
    eos = byte_tokenizer().eos_token_id
    folder = reward_model(tiny_llama, tmp_path / "rm", pad_token_id=pad_token_id and eos)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = pad_token_id and tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    reward, other = ModelReward(folder), ModelReward(reward_model(tiny_llama, tmp_path / "other"))
    scores = reward.score(PROMPTS, COMPLETIONS).total
    assert scores.tolist() == pytest.approx(other.score(PROMPTS, COMPLETIONS).total.tolist(), abs=1e-5)
    assert scores.tolist() == pytest.approx(one_by_one(reward, PROMPTS), abs=1e-5)


def test_a_batch_that_uses_the_whole_vocabulary(plain: Path) -> None:
    """No id is left to pad with."""
    reward = ModelReward(plain)
    rows = [list(range(0, 200)), list(range(150, reward.vocab_size)), [3, 1]]
    together = reward._forward(rows)
    assert together.tolist() == pytest.approx([reward._forward([row]).item() for row in rows], abs=1e-5)


def test_another_family_with_another_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2-rm"
    tokenizer = byte_tokenizer(chat=True)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=256, num_labels=1, eos_token_id=1
    )
    transformers.GPT2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reward = ModelReward(folder)
    scores = reward.score(CONVERSATIONS, COMPLETIONS).total
    assert scores.tolist() == pytest.approx(one_by_one(reward, CONVERSATIONS), abs=1e-5)
    assert scores.std() > 0
    with pytest.raises(RewardError, match=r"takes at most 256 tokens; there are 305 at row 1 .*completion 'xxx"):
        reward.score(PROMPTS[:2], ["a", "x" * 300])


def bert(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "who", "are", "you", "i", "am", "a", "program"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=1,
        initializer_range=0.5,
        pad_token_id=0,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_an_encoder_reads_prompt_and_completion_as_a_pair(tmp_path: Path) -> None:
    folder = bert(tmp_path / "bert")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts: list[Any] = ["who are you", "who", [{"role": "user", "content": "a program"}]]
    completions = ["i am a program", "you", "am i"]
    pairs = [("who are you", "i am a program"), ("who", "you"), ("a program", "am i")]
    expected = [model(**tokenizer(*pair, return_tensors="pt")).logits.item() for pair in pairs]
    scores = ModelReward(folder).score(prompts, completions).total
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_messages_without_a_template_are_named(plain: Path) -> None:
    with pytest.raises(RewardError, match=r"cannot read row 0 \(prompt 'Who are you\?'.*no chat template"):
        ModelReward(plain).score(CONVERSATIONS, COMPLETIONS)


def test_a_model_that_overflows(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rm"
    shutil.copytree(plain, folder)
    model = load_scalar_model(folder, dtype="float32")
    torch.nn.init.constant_(model.score.weight, 3e38)  # finite, so that it is loaded
    model.save_pretrained(folder)
    with pytest.raises(RewardError, match=r"reward model .*/rm returned (nan|-?inf) at row 0 \(prompt 'Who are you\?'"):
        ModelReward(folder).score(PROMPTS, COMPLETIONS)


def test_folders_that_are_no_reward_model(tiny_llama: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"holds a LlamaForCausalLM, which gives no scores. Train a reward model"):
        load_reward(str(tiny_llama))
    labels = reward_model(tiny_llama, tmp_path / "labels", id2label={"0": "bad", "1": "good"})
    with pytest.raises(RewardError, match=r"a classifier with 2 labels .* a reward or value model gives one number"):
        load_reward(str(labels))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RewardError, match=r"reward model .*/empty: .*config\.json"):
        load_reward(str(empty))
    shutil.copytree(plain, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RewardError, match=r"model\.safetensors: damaged or cut short"):
        load_reward(str(tmp_path / "cut"))
