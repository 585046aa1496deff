"""From files to examples, as the trainers do it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.data import ChatFormat, Examples, load_rows, preference_dataset, prompt_dataset, sft_dataset
from rlhf_fast.errors import ConfigError, DataError
from tests.conftest import byte_tokenizer

USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
MORE, BYE = {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "So long"}


@pytest.fixture
def build(tmp_path: Path):
    """Examples of rows written to a file."""

    def build(kind: str, rows: list[dict[str, Any]], *, chat: bool = False, on_bad_row: str = "error", **options: Any):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        make: Any = {"sft": sft_dataset, "preference": preference_dataset, "prompt": prompt_dataset}[kind]
        limit = {"max_prompt_length": 100} if kind == "prompt" else {"max_length": 100}
        loaded = load_rows(str(path), kind=kind, on_bad_row=on_bad_row)
        return make(loaded, ChatFormat(byte_tokenizer(chat)), **{**limit, **options})

    return build


def text(ids: list[int]) -> str:
    return byte_tokenizer().decode(ids)


def learnt(example: Any) -> str:
    return text([token for token, m in zip(example.input_ids, example.loss_mask, strict=True) if m])


def test_sft_learns_the_completion_and_eos(build) -> None:
    (example,) = build("sft", [{"prompt": "2+2=", "completion": "4"}])
    assert text(example.input_ids) == "2+2=4<|end|>"
    assert learnt(example) == "4<|end|>"


def test_sft_learns_everything_if_asked(build) -> None:
    (example,) = build("sft", [{"prompt": "2+2=", "completion": "4"}], completion_only_loss=False)
    assert learnt(example) == "+2=4<|end|>"  # all but the first token, which nothing precedes


def test_sft_learns_all_turns_of_messages_but_only_the_completion_of_a_pair(build) -> None:
    conversation = [USER, REPLY, MORE, BYE]
    pair = {"prompt": conversation[:3], "completion": conversation[3:]}
    both = build("sft", [{"messages": conversation}, pair], chat=True)
    assert both[0].input_ids == both[1].input_ids
    assert [learnt(e) for e in both] == ["Ho<|end|>So long<|end|>", "So long<|end|>"]
    (example,) = build("sft", [{"messages": conversation}], chat=True, completion_only_loss=False)
    assert learnt(example) == text(both[0].input_ids).removeprefix("<|user|>")


def test_sft_empty_prompt(build) -> None:
    (example,) = build("sft", [{"prompt": "", "completion": "abc"}])
    assert learnt(example) == "bc<|end|>"


def test_sft_is_cut_at_the_end(build) -> None:
    rows = [{"prompt": "ab", "completion": "cdef"}]
    (example,) = build("sft", rows, max_length=4)
    assert (text(example.input_ids), learnt(example)) == ("abcd", "cd")
    with pytest.raises(DataError, match=r"data.jsonl:1: field 'prompt': 2 tokens come before .* max_length is 2"):
        build("sft", rows, max_length=2)
    with pytest.raises(DataError, match=r"field 'messages': 5 tokens come before what is to be learnt"):
        build("sft", [{"messages": [USER, REPLY]}], chat=True, max_length=5)


def test_preference_pairs(build) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    examples = build("preference", [{**row, "margin": 2}, {**row, "rejected": "c"}])
    assert [(text(e.chosen_ids), text(e.rejected_ids), e.margin) for e in examples] == [
        ("qa<|end|>", "qb<|end|>", 2.0),
        ("qa<|end|>", "qc<|end|>", 0.0),
    ]
    (example,) = build("preference", [{"chosen": [USER, REPLY], "rejected": [USER, BYE]}], chat=True)
    assert text(example.chosen_ids) == "<|user|>Hi<|end|><|assistant|>Ho<|end|>"
    assert text(example.rejected_ids) == "<|user|>Hi<|end|><|assistant|>So long<|end|>"


def test_prompts_and_their_columns(build) -> None:
    examples = build("prompt", [{"prompt": "a", "answer": 1}, {"prompt": [USER], "level": "x"}], chat=True)
    assert [text(e.prompt_ids) for e in examples] == [
        "<|user|>a<|end|><|assistant|>",
        "<|user|>Hi<|end|><|assistant|>",
    ]
    assert [e.prompt for e in examples] == ["a", [USER]]
    assert [e.columns for e in examples] == [{"answer": 1, "level": None}, {"answer": None, "level": "x"}]


TOO_LONG = [
    ("preference", {"prompt": "q", "chosen": "a" * 9, "rejected": "b"}, {"max_length": 10}, "chosen"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b" * 9}, {"max_length": 10}, "rejected"),
    ("prompt", {"prompt": "q" * 11}, {"max_prompt_length": 10}, "prompt"),
]


@pytest.mark.parametrize(("kind", "row", "limit", "field"), TOO_LONG)
def test_too_long(build, kind: str, row: dict[str, Any], limit: dict[str, int], field: str) -> None:
    reason = rf"data.jsonl:2: field '{field}': too long: .* 11 tokens, {next(iter(limit))} is 10; shorten it or raise"
    good = {"prompt": "q", "chosen": "a" * 8, "rejected": "b" * 8} if kind == "preference" else {"prompt": "q" * 10}
    with pytest.raises(DataError, match=reason):
        build(kind, [good, row], **limit)
    examples = build(kind, [good, row], on_bad_row="skip", **limit)
    assert isinstance(examples, Examples)
    assert len(examples) == 1
    assert examples.report().startswith("1 of 2 rows left out: ")


def test_bad_rows_of_the_file_and_of_the_encoding_are_counted_together(build) -> None:
    rows = [{"prompt": "q"}, {"prompt": ""}, {"question": "q"}, {"prompt": "q" * 101}]
    examples = build("prompt", rows, on_bad_row="skip")
    assert len(examples) == 1
    assert [(b.line, b.field) for b in examples.bad_rows] == [(3, "prompt"), (2, "prompt"), (4, "prompt")]
    assert examples.report().startswith("3 of 4 rows left out: ")


def test_what_a_template_refuses_is_a_bad_row_at_its_line(build, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": [USER]}) + "\n\n" + json.dumps({"prompt": [USER, USER]}) + "\n")
    template = "{% if messages|length > 1 %}{{ raise_exception('one\nturn') }}{% endif %}{{ messages[0].content }}"
    chat = ChatFormat(byte_tokenizer(), chat_template="{{ messages[-1].content }}")
    chat.tokenizer.chat_template = template
    examples = prompt_dataset(load_rows(str(path), kind="prompt", on_bad_row="skip"), chat, max_prompt_length=9)
    (bad,) = examples.bad_rows
    assert str(bad) == f"{path}:3: the chat template given by chat_template fails: one turn"


def test_conversations_need_a_chat_template(build) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        build("sft", [{"messages": [USER, REPLY]}], on_bad_row="skip")
