"""Reading data files: what loads, and what a user is told about what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.data import Rows, load_rows
from rlhf_fast.errors import DataError

SFT = {"prompt": "2+2=", "completion": "4"}


def write(path: Path, *rows: Any) -> str:
    """JSON Lines; bytes and strings go in as they are."""
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def error(path: str | list[str], kind: str = "sft", **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(path, kind=kind, **options)
    return str(caught.value)


def row_error(tmp_path: Path, row: Any, kind: str) -> str:
    """The message for one bad row, which is line 2 of its file."""
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    good = {"sft": SFT, "preference": pair, "prompt": {"prompt": "a"}, "unsup": {"text": "a"}}[kind]
    path = write(tmp_path / "data.jsonl", good, row)
    message = error(path, kind)
    prefix = f"{path}:2: "
    assert message.startswith(prefix)
    assert message.endswith("Mend it, or leave bad rows out with on_bad_row=skip.")
    rows = load_rows(path, kind=kind, on_bad_row="skip")  # whatever is wrong with a row, it can be skipped
    assert len(rows) == 1
    assert [(b.path, b.line) for b in rows.bad_rows] == [(path, 2)]
    assert "\n" not in rows.report()
    return message.removeprefix(prefix)


# What loads


TEXTS = {
    "zh": "你好，世界。\u3000他说：「好」",
    "ar": "مرحبا بالعالم \u200f(سلام)",
    "hi": "नमस्ते दुनिया क्\u200dष",
    "emoji": "👩‍👩‍👧‍👦 🇩🇪 ☺️ 𝒳",
    "controls": "tab\t nul\x00 line\u2028separator next\x85line cr\r nbsp\xa0 bom\ufeff",
    "combining": "e\u0301 and \u00e9 stay apart; so do ﬁ and fi",
}


@pytest.mark.parametrize("escaped", [True, False], ids=["escaped", "utf-8"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "folder"])
def test_text_of_any_script_survives(tmp_path: Path, text: str, suffix: str, escaped: bool) -> None:
    row = {"prompt": text, "completion": f" {text}\n"}
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        write(path, json.dumps(row, ensure_ascii=escaped))
    else:
        save(row, path)
    assert list(load_rows(path, kind="sft")) == [row]


def save(row: dict[str, Any], path: Path) -> None:
    from datasets import Dataset

    dataset = Dataset.from_list([row])
    if path.suffix == ".parquet":
        dataset.to_parquet(path)
    else:
        dataset.save_to_disk(path)


def test_surrogate_pair_escapes_are_one_character(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", r'{"prompt": "\ud83d\ude00", "completion": "x"}')
    assert load_rows(path, kind="sft")[0]["prompt"] == "😀"


def test_bom_crlf_blank_lines_and_no_newline_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json.dumps(SFT).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line + b"\r\n" + line)
    rows = load_rows(str(path), kind="sft")
    assert list(rows) == [SFT] * 3
    assert [line for _, line in rows.places] == [1, 4, 5]


def test_huge_line(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "好" * 3_000_000}
    assert load_rows(write(tmp_path / "a.jsonl", row), kind="sft")[0] == row


def test_several_files_are_joined_in_order(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", {"prompt": "1"}, {"prompt": "2"})
    save({"prompt": "3", "answer": 3}, tmp_path / "b.parquet")
    save({"prompt": "4"}, tmp_path / "c")
    names = [a, str(tmp_path / "b.parquet"), str(tmp_path / "c")]
    rows = load_rows(names, kind="prompt")
    assert [r["prompt"] for r in rows] == ["1", "2", "3", "4"]
    assert rows[2]["answer"] == 3
    assert rows.places == [(a, 1), (a, 2), (names[1], 1), (names[2], 1)]
    assert isinstance(rows[1:3], Rows)
    assert rows[1:3].places == rows.places[1:3]


def test_datasets_folder_keeps_a_selection_and_its_order(tmp_path: Path) -> None:
    from datasets import Dataset

    dataset = Dataset.from_list([{"prompt": str(i)} for i in range(10)]).select([7, 2, 5])
    dataset.with_format("numpy").save_to_disk(tmp_path / "d")
    rows = load_rows(str(tmp_path / "d"), kind="prompt")
    assert [r["prompt"] for r in rows] == ["7", "2", "5"]


def test_rows_of_many_chunks(tmp_path: Path) -> None:
    from datasets import Dataset, concatenate_datasets

    parts = [Dataset.from_dict({"prompt": [str(i) for i in range(a, a + 1250)]}) for a in (0, 1250)]
    dataset = concatenate_datasets(parts)
    dataset.save_to_disk(tmp_path / "d")
    dataset.to_parquet(tmp_path / "d.parquet")
    for name in ("d", "d.parquet"):
        rows = load_rows(tmp_path / name, kind="prompt")
        assert [r["prompt"] for r in rows] == [str(i) for i in range(2500)]
        assert [line for _, line in rows.places] == list(range(1, 2501))


def test_nulls_are_absent_fields(tmp_path: Path) -> None:
    """Parquet writes the union of all rows' fields, nested ones too."""
    from datasets import Dataset

    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]
    rows: list[dict[str, Any]] = [{"prompt": "a", "completion": "b"}, {"messages": messages}]
    Dataset.from_list([{"messages": None, **rows[0]}, rows[1]]).to_parquet(tmp_path / "a.parquet")
    assert list(load_rows(tmp_path / "a.parquet", kind="sft")) == rows
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": None})
    assert load_rows(path, kind="preference")[0]["margin"] == 0.0


def test_prompt_rows_keep_their_columns(tmp_path: Path) -> None:
    row = {"prompt": "a", "answer": {"x": [1, None]}, "completion": "c"}
    assert list(load_rows(write(tmp_path / "a.jsonl", row), kind="prompt")) == [row]


USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def test_a_string_beside_messages_is_one_message(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", {"prompt": [USER], "completion": "a"}, {"prompt": "q", "completion": [ASSISTANT]}
    )
    assert list(load_rows(path, kind="sft")) == [{"prompt": [USER], "completion": [ASSISTANT]}] * 2


@pytest.mark.parametrize("extra", [{}, {"prompt": "q"}], ids=["no prompt", "prompt repeated as text"])
def test_preference_conversations_share_their_prompt(tmp_path: Path, extra: dict[str, str]) -> None:
    worse = {"role": "assistant", "content": "b"}
    row = {"chosen": [USER, ASSISTANT, USER, ASSISTANT], "rejected": [USER, ASSISTANT, USER, worse], **extra}
    (got,) = load_rows(write(tmp_path / "a.jsonl", row), kind="preference")
    assert got == {"prompt": [USER, ASSISTANT, USER], "chosen": [ASSISTANT], "rejected": [worse], "margin": 0.0}


# Files that do not load


def test_missing_file_and_a_close_name(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", SFT)
    message = error(str(tmp_path / "trian.jsonl"))
    assert "trian.jsonl: no such file or folder" in message
    assert f"did you mean {tmp_path / 'train.jsonl'}?" in message
    assert "no such file" in error("HuggingFaceH4/ultrafeedback")


def test_no_file() -> None:
    assert "no data file" in error([])


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert error(str(tmp_path / "a.jsonl")).endswith("a.jsonl: there is no row in it")


def test_empty_file_among_others(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").touch()
    message = error([write(tmp_path / "a.jsonl", SFT), str(tmp_path / "b.jsonl")], on_bad_row="skip")
    assert "b.jsonl: there is no row in it" in message


def test_folder_that_is_no_dataset(tmp_path: Path) -> None:
    assert "not one that datasets.save_to_disk has written" in error(str(tmp_path))
    path = write(tmp_path / "train.jsonl", SFT)
    assert f"name the files themselves: {path}" in error(str(tmp_path))


def test_folder_with_splits(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    parts = {name: Dataset.from_list([{"prompt": name}]) for name in ("train", "test")}
    DatasetDict(parts).save_to_disk(tmp_path / "d")
    message = error(str(tmp_path / "d"), "prompt")
    assert f"name one of them: {tmp_path / 'd' / 'test'}, {tmp_path / 'd' / 'train'}" in message
    assert load_rows(str(tmp_path / "d" / "train"), kind="prompt")[0] == {"prompt": "train"}


def test_damaged_folder(tmp_path: Path) -> None:
    save({"prompt": "a"}, tmp_path / "d")
    (arrow,) = (tmp_path / "d").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert "a damaged `datasets` folder" in error(str(tmp_path / "d"), "prompt")
    arrow.unlink()
    assert str(tmp_path / "d") in error(str(tmp_path / "d"), "prompt")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    save({"prompt": "a"}, path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "a.parquet: not a Parquet file, or a damaged one" in error(str(path), "prompt")
    path.write_bytes(b"")
    assert "not a Parquet file" in error(str(path), "prompt")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"hello", "must end in .jsonl or .parquet"),
        ("a.jsonl", json.dumps(SFT).encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", "compressed with gzip"),
        ("a.json", b'[\n{"prompt": "a"},\n{"prompt": "b"}\n]\n', "write each row as one object on one line"),
        ("a.json", b'{\n  "prompt": "a"\n}\n', "write each row as one object on one line"),
        ("a.json", b'[{"prompt": "a", "completion": "b"}]', "must be an object with named fields, this is a list"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert reason in error(str(tmp_path / name))


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    assert "loop.jsonl" in error(str(tmp_path / "loop.jsonl"))


# Rows that do not load


def test_offsets_count_the_bom(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf"\xff"\n\n"\xff"')
    message = error(str(tmp_path / "a.jsonl"))
    assert "a.jsonl:1: not UTF-8: byte 0xff at offset 1 of the line, 4 of the file" in message
    assert "a.jsonl:3: not UTF-8: byte 0xff at offset 1 of the line, 9 of the file" in message


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a", "completion": }', "not valid JSON: Expecting value at column 31"),
        (b'{"prompt": "a", "compl', "the line breaks off there"),
        (b'{"prompt": "a"} {"prompt": "b"}', "not valid JSON: Extra data at column 17"),
        (b"[1, 2]", "must be an object with named fields, this is a list"),
        (b"null", "this is null"),
        (b"3", "this is a number"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8: byte 0xe9 at offset 15 of the line, 53 of the file"),
        (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8: byte 0xed at offset 12"),
        (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"margin": ' + b"9" * 5000 + b"}", "not usable JSON: Exceeds the limit"),
    ],
)
def test_bad_lines(tmp_path: Path, line: bytes, reason: str) -> None:
    assert reason in row_error(tmp_path, line, "sft")


BAD_ROWS: list[tuple[str, Any, str]] = [
    # missing fields and hints
    ("sft", {}, "field 'messages': missing; a row has 'prompt' and 'completion', or 'messages'; the row has no field"),
    ("sft", {"text": "a"}, "the row has 'text'"),
    ("sft", {"prompt": "a", "response": "b"}, "field 'completion': missing; there is 'response': rename it to 'comp"),
    ("sft", {"prompt": "a", "Completion": "b"}, "field 'completion': missing; there is 'Completion'"),
    ("sft", {"prompt": "a", "completions": "b"}, "field 'completion': missing; there is 'completions'"),
    ("sft", {"instruction": "a", "completion": "b"}, "field 'prompt': missing; there is 'instruction'"),
    ("sft", {"conversations": []}, "field 'messages': missing; there is 'conversations'"),
    ("sft", {"prompt": "a", "completion": None}, "field 'completion': missing (it is null)"),
    ("preference", {"prompt": "a", "chosen": "b"}, "field 'rejected': missing; the row has 'prompt', 'chosen'"),
    ("preference", {"chosen": "ab", "rejected": "ac"}, "field 'prompt': missing; only whole conversations"),
    ("prompt", {"question": "a"}, "field 'prompt': missing; there is 'question'"),
    ("unsup", {}, "field 'text': missing; a row has 'text', 'prompt' and 'completion', or 'messages'; the row has no"),
    ("unsup", {"document": "a"}, "field 'text': missing; there is 'document': rename it to 'text'"),
    ("unsup", {"prompt": "a", "response": "b"}, "field 'completion': missing; there is 'response'"),
    ("unsup", {"text": "a", "messages": [USER, ASSISTANT]}, "field 'text': stands beside 'messages'; keep one"),
    ("unsup", {"text": ["a"]}, "field 'text': must be a string, this is a list"),
    ("unsup", {"text": ""}, "field 'text': empty"),
    # types
    ("sft", {"prompt": 3, "completion": "b"}, "field 'prompt': must be a string or a list of messages, this is a num"),
    ("sft", {"prompt": "a", "completion": {}}, "field 'completion': must be a string or a list of messages, this is"),
    ("sft", {"messages": "hello"}, "field 'messages': must be a list of messages, this is a string"),
    ("sft", {"messages": ["hello"]}, "field 'messages[0]': must be an object like"),
    ("sft", {"messages": []}, "field 'messages': an empty list"),
    # nothing to learn
    ("sft", {"prompt": "a", "completion": ""}, "field 'completion': empty"),
    ("sft", {"prompt": "a", "completion": " \n\u3000"}, "field 'completion': only white space"),
    ("sft", {"messages": [USER]}, "field 'messages': no assistant turn"),
    ("sft", {"messages": [USER, {"role": "assistant", "content": ""}]}, "field 'messages[1].content': an assistant t"),
    ("sft", {"messages": [USER, ASSISTANT], "completion": "a"}, "field 'messages': stands beside 'completion'"),
    # messages
    ("sft", {"messages": [USER, {"role": "gpt", "content": "a"}]}, "field 'messages[1].role': must be one of system, "),
    ("sft", {"messages": [USER, {"role": "gpt", "content": "a"}]}, "this is 'gpt'; write 'assistant'"),
    ("sft", {"messages": [{"content": "a"}]}, "field 'messages[0].role': must be one of"),
    ("sft", {"messages": [{"role": "user", "content": None}, ASSISTANT]}, "field 'messages[0].content': missing or n"),
    ("sft", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "must be a string, this is a list"),
    ("sft", {"messages": [{"from": "human", "value": "a"}]}, "field 'messages[0]': has 'from' and 'value'"),
    ("sft", {"prompt": [USER, ASSISTANT], "completion": "a"}, "field 'prompt': ends with an assistant turn"),
    ("sft", {"prompt": [USER], "completion": [USER]}, "field 'completion': must begin and end with an assistant turn"),
    ("prompt", {"prompt": []}, "field 'prompt': an empty list"),
    ("prompt", {"prompt": "a", "completions": 1}, "field 'completions': a reward function gets the rollout's own"),
    # preferences
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "field 'rejected': the same as 'chosen'"),
    ("preference", {"chosen": [USER, ASSISTANT], "rejected": [ASSISTANT]}, "field 'rejected': begins differently"),
    ("preference", {"chosen": [ASSISTANT], "rejected": [USER]}, "field 'prompt': missing; only whole conversations"),
    (
        "preference",
        {"chosen": [USER, ASSISTANT], "rejected": [{"role": "user", "content": "x"}, ASSISTANT]},
        "field 'rejected': begins differently from 'chosen'",
    ),
    ("preference", {"chosen": [USER, ASSISTANT], "rejected": [USER]}, "field 'rejected': the other conversation begi"),
    ("preference", {"prompt": [USER], "chosen": [USER, ASSISTANT], "rejected": [USER]}, "leave 'prompt' out"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"}, "field 'margin': must be a number"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": True}, "this is true or false"),
    (
        "preference",
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")},
        "must be finite, this is ",
    ),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400}, "must be finite, this is inf"),
    # half of a surrogate pair is no text: no tokenizer takes it
    ("sft", {"prompt": "a\ud800b", "completion": "x"}, r"field 'prompt': a lone surrogate, \ud800, at character 1"),
    ("sft", {"messages": [USER, {"role": "assistant", "content": "\udfff"}]}, "field 'messages[1].content': a lone s"),
    ("prompt", {"prompt": "a", "meta": {"x": ["\ud83d"]}}, "field 'meta.x[0]': a lone surrogate"),
    ("prompt", {"prompt": "a", "\ud83d": 1}, "a lone surrogate"),
]


@pytest.mark.parametrize(("kind", "row", "reason"), BAD_ROWS)
def test_bad_rows(tmp_path: Path, kind: str, row: Any, reason: str) -> None:
    message = row_error(tmp_path, row, kind)
    assert reason in message
    message.encode("utf-8")  # it can be printed


def test_parquet_strings_that_are_not_utf8(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    good = pyarrow.array([b"fine", b"caf\xe9", "好".encode()], type=pyarrow.binary())
    table = pyarrow.table({"prompt": good.view(pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = load_rows(tmp_path / "a.parquet", kind="prompt", on_bad_row="skip")
    assert [r["prompt"] for r in rows] == ["fine", "好"]
    assert [(b.line, b.reason) for b in rows.bad_rows] == [(2, "not UTF-8: byte 0xe9 at offset 3 of a text")]


def test_all_bad_rows_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *([{"prompt": "a"}, "{", SFT] * 10))
    message = error(path)
    assert message.splitlines()[0] == "20 bad rows:"
    assert [f"a.jsonl:{n}: " in message for n in (1, 2, 4, 5)] == [True, True, True, False]
    assert "and 17 more" in message
    rows = load_rows(path, kind="sft", on_bad_row="skip")
    assert (len(rows), len(rows.bad_rows)) == (10, 20)
    assert rows.report().startswith(f"20 of 30 rows left out: {path}:1: field 'completion': missing")
    assert load_rows(write(tmp_path / "b.jsonl", SFT), kind="sft").report() == ""


def test_no_row_left(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "b"})
    message = error(path, on_bad_row="skip")
    assert message.startswith("all 2 rows are bad, none is left:")
    assert "a.jsonl:2: field 'completion'" in message
