"""Stop strings in a text that arrives in bytes."""

from __future__ import annotations

import pytest

from rlhf_fast.generation.stop_strings import StopStrings
from tests.conftest import byte_tokenizer


def feed(text: str, stop: list[str], min_tokens: int = 0) -> tuple[int | None, str | None]:
    """Tokens taken until a stop string appeared, and the text before it."""
    tokenizer = byte_tokenizer()
    watcher = StopStrings(tokenizer, stop, min_tokens)
    for count, token in enumerate(tokenizer(text)["input_ids"], start=1):
        if watcher.add(token):
            return count, watcher.text[: watcher.end]
    assert watcher.text == text
    return None, None


@pytest.mark.parametrize(
    ("text", "stop", "tokens", "before"),
    [
        ("one two three", ["two"], 7, "one "),
        ("one two three", ["wo t", "three"], 9, "one t"),
        ("你好。再见", ["。再"], 12, "你好"),  # three bytes a character: whole only with the twelfth token
        ("你好。再见", ["见", "好"], 6, "你"),
        ("🙂🙃", ["🙃"], 8, "🙂"),
        ("مرحبا", ["حب"], 8, "مر"),
        ("aaab", ["ab"], 4, "aa"),
        ("nothing here", ["two", "再"], None, None),
    ],
)
def test_where_it_ends(text: str, stop: list[str], tokens: int | None, before: str | None) -> None:
    assert feed(text, stop) == (tokens, before)


def test_before_min_tokens_nothing_stops() -> None:
    assert feed("ab ab ab", ["ab"], min_tokens=0) == (2, "")
    assert feed("ab ab ab", ["ab"], min_tokens=4) == (5, "ab ")
    assert feed("ab ab ab", ["ab"], min_tokens=5) == (5, "ab ")
    assert feed("ab ab ab", ["ab"], min_tokens=6) == (8, "ab ab ")


def test_bytes_that_are_no_text_do_not_hide_what_follows() -> None:
    tokenizer = byte_tokenizer()
    lone = tokenizer("你")["input_ids"][1]  # a continuation byte alone
    watcher = StopStrings(tokenizer, ["end"], 0)
    assert [watcher.add(token) for token in [lone, lone, *tokenizer("end")["input_ids"]]] == [False] * 4 + [True]
