"""What a conversation remembers and what the model is given of it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from rlhf_fast.chat import Conversation
from rlhf_fast.errors import ConfigError, DataError, ModelError
from rlhf_fast.generation import Generator, SamplingParams
from rlhf_fast.models import load_causal_lm, load_tokenizer
from tests.conftest import byte_tokenizer
from tests.generation.test_generator import scripted_model


def says(text: str, prompt: str, max_tokens: int = 32, system_prompt: str | None = None) -> Conversation:
    """A model that answers `text` to a rendered `prompt` of exactly that length, and then ends its turn."""
    tokenizer = byte_tokenizer(chat=True)
    said = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    script = [0] * (len(tokenizer(prompt)["input_ids"]) - 1) + said
    model = scripted_model(script, len(tokenizer), eos=tokenizer.eos_token_id)
    return Conversation(Generator(model, tokenizer), SamplingParams(max_tokens=max_tokens), system_prompt)


def test_a_reply_in_whole_characters_is_remembered() -> None:
    talk = says("你好🙂", "<|user|>hi<|end|><|assistant|>")
    assert list(talk.reply("hi")) == ["你", "好", "🙂"]
    assert talk.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "你好🙂"}]
    tokenizer = talk.format.tokenizer
    assert tokenizer.decode(talk._prompt({"role": "user", "content": "再见"})) == (
        "<|user|>hi<|end|><|assistant|>你好🙂<|end|><|user|>再见<|end|><|assistant|>"
    )


def test_the_system_prompt_stands_first_and_a_new_start_forgets() -> None:
    talk = says("ok", "<|system|>Be kind.<|end|><|user|>a<|end|><|assistant|>", system_prompt="Be kind.")
    assert "".join(talk.reply("a")) == "ok"
    talk.start_over("Be brief.")
    assert talk.messages == []
    prompt = talk.format.tokenizer.decode(talk._prompt({"role": "user", "content": "a"}))
    assert prompt == "<|system|>Be brief.<|end|><|user|>a<|end|><|assistant|>"
    talk.start_over(None)
    assert "system" not in talk.format.tokenizer.decode(talk._prompt({"role": "user", "content": "a"}))


def test_a_reply_that_is_cut_short_is_remembered_so_far() -> None:
    talk = says("abcdef", "<|user|>hi<|end|><|assistant|>")
    with contextlib.closing(talk.reply("hi")) as pieces:
        assert [next(pieces), next(pieces)] == ["a", "b"]
    assert talk.messages[1]["content"] == "ab"


def test_the_oldest_messages_are_forgotten_when_the_context_is_full() -> None:
    talk = says("ok", "<|user|>abc<|end|><|assistant|>", max_tokens=32)  # of 64 positions
    talk.messages = [{"role": role, "content": 7 * "x"} for role in ("user", "assistant") * 2]
    prompt = talk.format.tokenizer.decode(talk._prompt({"role": "user", "content": "abc"}))
    assert prompt == "<|user|>xxxxxxx<|end|><|assistant|>xxxxxxx<|end|><|user|>abc<|end|><|assistant|>"
    assert talk.forgotten == 2
    with pytest.raises(ModelError, match="context holds 64"):
        list(talk.reply(80 * "y"))
    assert talk.messages == []
    assert "".join(talk.reply("abc")) == "ok"  # it goes on


def test_without_a_template_each_line_is_continued_by_itself(tiny_llama: Path) -> None:
    generator = Generator(load_causal_lm(tiny_llama, dtype="float32"), load_tokenizer(tiny_llama))
    params = SamplingParams(max_tokens=8, seed=0)
    talk = Conversation(generator, params)
    first = "".join(talk.reply("你好"))
    assert "".join(talk.reply("你好")) == first
    assert first == generator.generate(["你好"], params)[0].text.rstrip("\ufffd")
    with pytest.raises(ConfigError, match="needs a chat template"):
        talk.start_over("Be kind.")
    with pytest.raises(ConfigError, match="needs a chat template"):
        Conversation(generator, params, "Be kind.")


def test_what_the_template_refuses_is_not_remembered() -> None:
    talk = says("ok", "<|user|>abc<|end|><|assistant|>")
    talk.format.tokenizer.chat_template = "{{ raise_exception('no') if messages[0].role == 'system' else 'abc' }}"
    talk.start_over("Be kind.")
    with pytest.raises(DataError, match="template fails: no"):
        list(talk.reply("abc"))
    assert talk.messages == []
