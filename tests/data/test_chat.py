"""ChatFormat: ids and masks, held against the text that a template renders and against transformers' own encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.data import ChatFormat, RowError
from rlhf_fast.errors import ConfigError
from tests.conftest import CHAT_TEMPLATE, byte_tokenizer

USER = {"role": "user", "content": "Hi there?"}
REPLY = {"role": "assistant", "content": " I am well. "}
SYSTEM = {"role": "system", "content": "Be kind."}
MORE = {"role": "user", "content": "再见 👋"}
BYE = {"role": "assistant", "content": "مع السلامة"}

# Each in the manner of a family of models, made short. The byte tokenizer's special tokens stand for theirs.
TEMPLATES = {
    # ChatML: a newline, which nobody says, after the end marker
    "newline": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    # Mistral: no header before a reply, so no generation prompt; white space trimmed; roles must alternate
    "no header": "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] | trim }}<|end|>"
    "{% endif %}{% endfor %}",
    # Gemma: a turn ends with a marker that is not EOS
    "own marker": "{% for m in messages %}<|user|>{{ m['role'] }}\n{{ m['content'] | trim }}<|system|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}",
    # Phi: a marker that is not EOS, and EOS at the end of the whole conversation
    "closed": "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|pad|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}",
    # A base model's: no special token at all
    "plain": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}
# What is learnt of [USER, REPLY, MORE, BYE]
SAID = {
    "newline": [" I am well. <|end|>", "مع السلامة<|end|>"],
    "no header": [" I am well.<|end|>", " مع السلامة<|end|>"],
    "own marker": ["I am well.<|system|>", "مع السلامة<|system|>"],
    "closed": [" I am well. <|pad|>", "مع السلامة<|pad|>"],
    "plain": [" I am well.", "مع السلامة<|end|>"],  # no marker to learn; white space at a turn's end is the template's
}


def chat(template: str | None = CHAT_TEMPLATE, **options: Any) -> ChatFormat:
    return ChatFormat(byte_tokenizer(), chat_template=template, **options)


def text(format: ChatFormat, ids: list[int]) -> str:
    return format.tokenizer.decode(ids)


def said(format: ChatFormat, ids: list[int], mask: list[bool]) -> list[str]:
    """The stretches of text under the mask."""
    runs: list[list[int]] = [[]]
    for token, trained in zip(ids, mask, strict=True):
        if trained:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [text(format, run) for run in runs if run]


@pytest.mark.parametrize("name", TEMPLATES)
def test_mask_is_what_the_assistant_says(name: str) -> None:
    format = chat(TEMPLATES[name])
    ids, mask = format.encode_messages([USER, REPLY, MORE, BYE])
    assert said(format, ids, mask) == SAID[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_the_rendered_conversation(name: str) -> None:
    """Up to the last end marker, ids are those of the whole text, as transformers tokenises it in one go."""
    format = chat(TEMPLATES[name])
    messages = [USER, REPLY, MORE, BYE]
    ids, mask = format.encode_messages(messages)
    whole = format.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    if name == "plain":
        assert ids[:-1] == whole[: len(ids) - 1]
        assert ids[-1] == format.tokenizer.eos_token_id
    else:
        assert ids == whole[: len(ids)]
    assert mask[-1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_completion_follows_the_prompt_that_the_policy_sees(name: str) -> None:
    format = chat(TEMPLATES[name])
    history = [USER, REPLY, MORE]
    prompt_ids, ids = format.encode_completion(history, [BYE])
    assert prompt_ids == format.encode_prompt(history)
    assert prompt_ids == format.tokenizer.apply_chat_template(
        history, tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert text(format, ids) == SAID[name][-1]
    assert ids[-1] == format.end_token_id
    assert ids.count(format.end_token_id) == 1
    assert (prompt_ids + ids) == format.encode_messages([*history, BYE])[0]
    assert format.encode_completion(history, BYE["content"]) == (prompt_ids, ids)


def test_stop_tokens_are_the_templates_marker_and_eos() -> None:
    end, system = (byte_tokenizer().convert_tokens_to_ids(t) for t in ("<|end|>", "<|system|>"))
    assert chat(TEMPLATES["newline"]).stop_token_ids == [end]
    assert chat(TEMPLATES["plain"]).stop_token_ids == [end]
    assert chat(TEMPLATES["closed"]).stop_token_ids == [byte_tokenizer().pad_token_id, end]
    assert chat(TEMPLATES["own marker"]).stop_token_ids == [end, system]


def test_plain_strings_with_a_template_are_one_exchange() -> None:
    format = chat()
    assert text(format, format.encode_prompt("Hi")) == "<|user|>Hi<|end|><|assistant|>"
    prompt_ids, ids = format.encode_completion("Hi", "Ho")
    assert text(format, prompt_ids) == "<|user|>Hi<|end|><|assistant|>"
    assert text(format, ids) == "Ho<|end|>"
    assert text(format, format.encode_completion("Hi", "")[1]) == "<|end|>"  # as a policy may say it
    bare = chat("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    assert text(bare, bare.encode_completion("Hi", "")[1]) == "[assistant]<|end|>"


def test_system_prompt_goes_where_there_is_none() -> None:
    format = chat(system_prompt="Rhyme.")
    assert text(format, format.encode_prompt("Hi")).startswith("<|system|>Rhyme.<|end|><|user|>Hi")
    assert text(format, format.encode_prompt([SYSTEM, USER])).startswith("<|system|>Be kind.<|end|><|user|>Hi")
    ids, mask = format.encode_messages([USER, REPLY])
    assert text(format, ids).startswith("<|system|>Rhyme.<|end|><|user|>")
    assert said(format, ids, mask) == [" I am well. <|end|>"]
    prompt_ids, _ = format.encode_completion([USER], [REPLY])
    assert prompt_ids == format.encode_prompt([USER])


def test_tools_results_are_not_trained() -> None:
    format = chat()
    call = {"role": "assistant", "content": "look", "tool_calls": [{"type": "function"}]}
    tool = {"role": "tool", "content": "4"}
    ids, mask = format.encode_messages([USER, call, tool, REPLY])
    assert said(format, ids, mask) == ["look<|end|>", " I am well. <|end|>"]
    prompt_ids, ids = format.encode_completion([USER], [call, tool, REPLY])
    assert prompt_ids == format.encode_prompt([USER])
    assert text(format, ids) == "look<|end|><|tool|>4<|end|><|assistant|> I am well. <|end|>"


def test_train_from_leaves_earlier_turns_out() -> None:
    format = chat()
    ids, mask = format.encode_messages([USER, REPLY, MORE, BYE], train_from=2)
    assert ids == format.encode_messages([USER, REPLY, MORE, BYE])[0]
    assert said(format, ids, mask) == ["مع السلامة<|end|>"]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TEMPLATES["closed"]])
def test_conversation_that_begins_with_the_assistant(template: str) -> None:
    format = chat(template)
    end = text(format, [format.end_token_id])
    ids, mask = format.encode_messages([REPLY, USER, BYE])
    assert text(format, ids) == f"<|assistant|> I am well. {end}<|user|>Hi there?{end}<|assistant|>مع السلامة{end}"
    assert said(format, ids, mask) == [f" I am well. {end}", f"مع السلامة{end}"]


def test_turns_after_the_last_reply_are_left_out() -> None:
    format = chat()
    assert format.encode_messages([USER, REPLY, MORE]) == format.encode_messages([USER, REPLY])


def test_end_marker_written_in_the_text_does_not_end_the_mask() -> None:
    format = chat()
    ids, mask = format.encode_messages([USER, {"role": "assistant", "content": "a<|end|>b"}])
    assert said(format, ids, mask) == ["a<|end|>b<|end|>"]


# Reasoning models drop earlier turns' thoughts, so a turn reads differently once others follow.
FORGETFUL = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_template_that_rewrites_earlier_turns() -> None:
    format = chat(FORGETFUL)
    with pytest.raises(RowError, match=r"writes assistant turn 2 differently .* write the row as 'prompt' and 'comple"):
        format.encode_messages([USER, REPLY, MORE, BYE])
    ids, mask = format.encode_messages([USER, REPLY, MORE, BYE], train_from=2)  # as the advice says
    assert said(format, ids, mask) == ["<think></think>مع السلامة<|end|>"]


def test_template_whose_opening_is_not_what_it_writes() -> None:
    """Then a prompt can be rolled out, but there is no completion to learn."""
    format = chat(CHAT_TEMPLATE.replace("<|assistant|>{% endif", "<|assistant|><think>{% endif"))
    assert text(format, format.encode_prompt("Hi")).endswith("<think>")
    with pytest.raises(RowError, match="writes assistant turn 2 differently"):
        format.encode_completion("Hi", "Ho")


def test_complaint_of_a_template_is_the_rows_fault() -> None:
    format = chat(TEMPLATES["no header"])
    with pytest.raises(RowError, match="given by chat_template fails: roles must alternate"):
        format.encode_messages([USER, USER, REPLY])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content }", "given by chat_template fails"),
        ("{{ nothing.content }}", "given by chat_template fails: 'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", "given by chat_template fails"),
        ("{{ messages[0].content }}", "does not write what the assistant says"),
        ("no/such/file.jinja", "'no/such/file.jinja' is no Jinja template .* cannot be read as a file"),
        ("x" * 5000, "cannot be read as a file"),
    ],
)
def test_broken_templates(template: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        chat(template)


def test_broken_template_of_the_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(ConfigError, match="the tokenizer's own chat template fails"):
        ChatFormat(tokenizer)


def test_template_that_knows_no_system_role() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
    chat(template)
    with pytest.raises(ConfigError, match="fails: no system role; leave system_prompt out"):
        chat(template, system_prompt="Be kind.")


def test_template_from_a_file_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    format = chat(str(tmp_path / "chat.jinja"))
    assert format.encode_prompt("Hi") == chat().encode_prompt("Hi")
    assert format.tokenizer.chat_template == CHAT_TEMPLATE


def test_template_by_name() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATES["newline"], "short": CHAT_TEMPLATE}
    assert ChatFormat(tokenizer, chat_template="short").encode_prompt("Hi") == chat().encode_prompt("Hi")


def test_without_a_template_there_are_no_conversations_and_no_system_prompt() -> None:
    format = chat(None)
    for encode in (lambda: format.encode_prompt([USER]), lambda: format.encode_messages([USER, REPLY])):
        with pytest.raises(ConfigError, match="no chat template; give one with chat_template"):
            encode()
    with pytest.raises(ConfigError, match="system_prompt needs a chat template"):
        chat(None, system_prompt="Be kind.")


def test_tokenizer_without_eos() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    format = ChatFormat(tokenizer)
    assert format.stop_token_ids == []
    with pytest.raises(ConfigError, match="no EOS token"):
        format.encode_completion("a", "b")


def test_what_a_reward_function_sees() -> None:
    format = chat(system_prompt="Rhyme.")
    assert format.prompt_text("Hi") == "Hi"
    assert format.prompt_text([SYSTEM, USER]) == "Hi there?"
    assert format.prompt_text([USER, REPLY, MORE]).startswith("<|system|>Rhyme.<|end|><|user|>Hi there?<|end|><|assist")
    assert chat(None).prompt_text([USER]) == "Hi there?"


# Plain text


@pytest.mark.parametrize("prompt", ["Q: 1+1=", "ends with a space ", "", "好"])
@pytest.mark.parametrize("completion", ["2", " two", "\n", "👋"])
def test_plain_text_is_prompt_completion_eos(prompt: str, completion: str) -> None:
    format = chat(None)
    prompt_ids, ids = format.encode_completion(prompt, completion)
    assert prompt_ids == format.encode_prompt(prompt)
    assert text(format, prompt_ids) == prompt
    assert text(format, ids) == f"{completion}<|end|>"
    assert ids.count(format.tokenizer.eos_token_id) == 1


def test_no_second_eos() -> None:
    format = chat(None)
    assert format.encode_completion("a", "b<|end|>") == format.encode_completion("a", "b")


def sentencepiece_tokenizer() -> Any:
    """In the manner of Llama 2: puts a space in front of a text, merges across it, and adds BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    words = ["the sky is blue and green", "the sea is green and blue", "answer: 4 = 2+2", "a\nb"]
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(words * 4, trainers.BpeTrainer(vocab_size=120, special_tokens=specials))
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_bos_once_and_no_space_put_inside_a_text() -> None:
    tokenizer = sentencepiece_tokenizer()
    format = ChatFormat(tokenizer)
    whole = tokenizer("the sky is blue").input_ids
    assert tokenizer.convert_ids_to_tokens(whole)[:2] == ["<s>", "▁the"]
    prompt_ids, ids = format.encode_completion("the sky is", " blue")
    assert [*prompt_ids, *ids] == [*whole, tokenizer.eos_token_id]
    assert format.encode_prompt("<s>the sky is").count(tokenizer.bos_token_id) == 1
    assert format.encode_prompt("") == [tokenizer.bos_token_id]
    assert format.encode_completion("", "the sky is blue") == ([whole[0]], [*whole[1:], tokenizer.eos_token_id])
    # Inside a word nothing is put between either, and the prompt is what it is without the rest.
    prompt_ids, ids = format.encode_completion("the sk", "y is")
    assert prompt_ids == tokenizer("the sk").input_ids
    assert tokenizer.decode(ids[:-1], skip_special_tokens=True) in ("y is", " y is".strip())
    assert not tokenizer.convert_ids_to_tokens(ids)[0].startswith("▁")


def test_template_that_writes_bos_gets_no_second_one() -> None:
    tokenizer = sentencepiece_tokenizer()
    template = "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    format = ChatFormat(tokenizer, chat_template=template)
    assert format.encode_prompt("the sky").count(tokenizer.bos_token_id) == 1
    ids, mask = format.encode_messages([USER, {"role": "assistant", "content": "the sky is blue"}])
    assert ids.count(tokenizer.bos_token_id) == 1
    trained = [token for token, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.convert_ids_to_tokens(trained) == ["▁the", "▁sky", "▁is", "▁blue", "</s>"]
