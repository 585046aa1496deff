"""Text in pieces: whole characters, nothing of a stop string, together what generate gives."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rlhf_fast.errors import NonFiniteError
from rlhf_fast.generation import Generator, SamplingParams
from rlhf_fast.generation.stop_strings import INCOMPLETE
from rlhf_fast.generation.streaming import StreamedText
from rlhf_fast.models import load_causal_lm, load_tokenizer
from tests.conftest import byte_tokenizer
from tests.families import tiny_model
from tests.generation.test_generator import scripted_model


def streamed(text: str, stop: Sequence[str] = (), min_tokens: int = 0) -> list[str]:
    """The pieces of a text that arrives byte by byte, until a stop string ends it."""
    tokenizer = byte_tokenizer()
    row = StreamedText(tokenizer, stop, min_tokens)
    return list(row.pieces(lambda: any(row.add(token) for token in tokenizer(text)["input_ids"])))


@pytest.mark.parametrize(
    ("text", "stop", "pieces"),
    [
        ("abc", [], ["a", "b", "c"]),
        ("你好🙂", [], ["你", "好", "🙂"]),
        ("one two", ["two"], ["o", "n", "e", " "]),
        ("a tower", ["two"], ["a", " ", "to", "w", "e", "r"]),  # "t" waited for what follows
        ("an end of a line", ["line!"], [*"an end of a ", "line"]),  # the last piece waited to the end
        ("再见了", ["见了", "了不"], ["再"]),
        ("aab", ["ab"], ["a"]),
    ],
)
def test_pieces(text: str, stop: list[str], pieces: list[str]) -> None:
    assert streamed(text, stop) == pieces


def test_before_min_tokens_a_stop_string_is_text() -> None:
    assert "".join(streamed("ab ab ab", ["ab"], min_tokens=6)) == "ab ab "


def test_together_the_pieces_are_the_completion(tiny_llama: Path) -> None:
    generator = Generator(load_causal_lm(tiny_llama, dtype="float32"), load_tokenizer(tiny_llama))
    for seed in range(3):
        params = SamplingParams(max_tokens=60, seed=seed, stop=["e", "好"])
        text = generator.generate(["你好"], params)[0].text
        assert "".join(generator.stream("你好", params)).rstrip(INCOMPLETE) == text.rstrip(INCOMPLETE)


def test_a_character_that_the_limit_cuts_is_left_out() -> None:
    tokenizer = byte_tokenizer()
    said = tokenizer("好🙂🙂")["input_ids"]
    generator = Generator(scripted_model(said, len(tokenizer)), tokenizer)
    assert list(generator.stream([70], SamplingParams(max_tokens=9))) == ["好", "🙂"]
    assert list(generator.stream([70], SamplingParams(max_tokens=11))) == ["好", "🙂", "🙂"]


def test_the_token_that_ends_it_is_not_text() -> None:
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    said = [*tokenizer("ab")["input_ids"], end, *tokenizer("cd")["input_ids"]]
    generator = Generator(scripted_model(said, len(tokenizer), eos=end), tokenizer)
    assert list(generator.stream([70], SamplingParams(max_tokens=5))) == ["a", "b"]


def test_closing_it_ends_the_decoding() -> None:
    tokenizer = byte_tokenizer()
    model, read = scripted_model(tokenizer("abcdefghij" * 6)["input_ids"], len(tokenizer)), threading.Event()
    generator = Generator(model, tokenizer)
    row = StreamedText(tokenizer, [], 0)
    tokens = iter(tokenizer("abcdef")["input_ids"])

    def decode() -> None:
        assert not row.add(next(tokens))
        assert read.wait(timeout=60)
        assert row.add(next(tokens))  # the row is told to end

    pieces = row.pieces(decode)
    assert next(pieces) == "a"
    threading.Timer(0.05, read.set).start()
    pieces.close()
    assert read.is_set()  # close waited for decode to return

    assert next(generator.stream([70], SamplingParams(max_tokens=50))) == "a"
    assert "".join(generator.stream([70], SamplingParams(max_tokens=4))) == "abcd"  # the generator is free again


def test_errors_arrive_where_the_pieces_do() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        Generator(tiny_model("llama")).stream([3], SamplingParams())
    model = scripted_model([5] * 9, len(tokenizer))
    generator = Generator(model, tokenizer)
    with pytest.raises(ValueError, match="one completion at a time, got n=2"):
        generator.stream([3], SamplingParams(n=2))
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        next(generator.stream([], SamplingParams()))
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match="logits are NaN"):
        list(generator.stream([3], SamplingParams()))
