"""The demo's data: what is held out is really unseen, damage is damage, the same seed gives the same bytes."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[3] / "recipes/demo/prepare.py"
ENGLISH = "I like to chat with people. I find it stimulating!"
CHINESE = "我对历史很感兴趣了。你喜欢什么时期？"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_prepare", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    subprocess.run([sys.executable, SCRIPT, "--output_dir", folder], check=True, capture_output=True)
    return folder


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"data/{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_nothing_held_out_is_seen_in_training(prepare: ModuleType, written: Path) -> None:
    train = {
        prepare.key(text)
        for name in ("sft_train", "preference_train", "prompts_train")
        for row in rows(written, name)
        for column, text in row.items()
        if column in ("prompt", "completion", "chosen")
    }
    for name in ("sft_eval", "preference_eval", "prompts_eval"):
        held_out = rows(written, name)
        assert held_out
        for row in held_out:
            for column in {"prompt", "completion", "chosen"} & row.keys():
                assert prepare.key(row[column]) not in train


def test_there_is_enough_of_both_languages(written: Path) -> None:
    prompts = Counter(row["language"] for row in rows(written, "prompts_eval"))
    assert prompts["english"] >= 100
    assert prompts["chinese"] >= 80
    assert len(rows(written, "sft_train")) >= 900


def test_every_kind_of_damage_is_there(written: Path) -> None:
    for name in ("preference_train", "preference_eval"):
        kinds = Counter(row["damage"] for row in rows(written, name))
        assert set(kinds) == {"shuffled", "cut off", "stuttering", "mixed up", "other language"}
        assert min(kinds.values()) >= 50


def test_the_base_model_reads_any_text(written: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(written / "base")
    model = AutoModelForCausalLM.from_pretrained(written / "base")
    for text in (ENGLISH, CHINESE, "مرحبا नमस्ते 🙂"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert max(ids) < model.config.vocab_size
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|user|>Hi<|end|><|assistant|>Hello<|end|>"
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_same_seed_gives_the_same_files(written: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, SCRIPT, "--output_dir", tmp_path], check=True, capture_output=True)
    files = [file for file in written.rglob("*") if file.is_file()]
    assert files
    for file in files:
        assert file.read_bytes() == (tmp_path / file.relative_to(written)).read_bytes(), file.name


@pytest.mark.parametrize("reply", [ENGLISH, CHINESE])
def test_damage(prepare: ModuleType, reply: str) -> None:
    words = Counter(word.strip() for word in prepare.words(reply))
    for seed in range(20):
        rng = random.Random(seed)
        shuffled = prepare.shuffled(reply, rng)
        assert shuffled != reply
        assert Counter(word.strip() for word in prepare.words(shuffled)) == words
        assert shuffled[-1] == reply[-1]

        cut = prepare.cut_off(reply, rng)
        assert len(prepare.words(cut)) < len(prepare.words(reply))
        assert prepare.key(reply).startswith(prepare.key(cut))

        stuttering = Counter(word.strip() for word in prepare.words(prepare.stuttering(reply, rng)))
        assert max(stuttering[word] - words[word] for word in words) >= 2
        assert set(stuttering) == set(words)

        mixed = prepare.mixed_up(reply, rng, ["zebra"])
        assert mixed.count("zebra") >= 2
        assert mixed[-1] == reply[-1]


@pytest.mark.parametrize("reply", ["No", "是", "Yes."])
def test_a_word_cannot_be_damaged(prepare: ModuleType, reply: str) -> None:
    rng = random.Random(0)
    assert prepare.shuffled(reply, rng) is None
    assert prepare.cut_off(reply, rng) is None
    assert prepare.stuttering(reply, rng) is None
    assert prepare.mixed_up(reply, rng, ["zebra"]) is None


def test_pairs_that_share_a_text_stay_together(prepare: ModuleType) -> None:
    pairs = [prepare.Pair("english", f"prompt {i}", f"reply {i // 2}") for i in range(40)]
    train, held_out = prepare.split(pairs, {"english": 10}, random.Random(0))
    assert sorted(train + held_out) == sorted(pairs)
    assert len(held_out) == 10
    assert not {pair.reply for pair in train} & {pair.reply for pair in held_out}


def test_a_missing_corpus_says_what_to_install(prepare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])  # nothing can be found any more
    monkeypatch.delitem(sys.modules, "chatterbot_corpus", raising=False)
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(SystemExit, match="pip install chatterbot-corpus"):
        prepare.corpus_folder()
