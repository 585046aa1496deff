"""SamplingParams says which field is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_fast.generation import SamplingParams

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"n": 0}, ValueError, "n: must be at least 1, got 0"),
    ({"n": 1.5}, TypeError, "n: a whole number was expected, got 1.5"),
    ({"temperature": -0.1}, ValueError, "temperature: must be at least 0"),
    ({"temperature": float("nan")}, TypeError, "temperature: a finite number"),
    ({"temperature": "hot"}, TypeError, "temperature: a finite number was expected, got 'hot'"),
    ({"top_p": 0.0}, ValueError, "top_p: must be above 0 and at most 1"),
    ({"top_p": 1.01}, ValueError, "top_p: "),
    ({"top_k": -2}, ValueError, "top_k: must be at least 1, or 0 or -1"),
    ({"top_k": True}, TypeError, "top_k: a whole number"),
    ({"min_p": 1.5}, ValueError, "min_p: must be from 0"),
    ({"repetition_penalty": 0}, ValueError, "repetition_penalty: must be above 0"),
    ({"max_tokens": 0}, ValueError, "max_tokens: must be at least 1"),
    ({"min_tokens": 17}, ValueError, r"min_tokens: must be from 0 to max_tokens \(16\)"),
    ({"stop": ["a", ""]}, ValueError, "stop: must be not empty"),
    ({"stop": [3]}, TypeError, "stop: a string or a list of strings"),
    ({"stop_token_ids": [-1]}, ValueError, "stop_token_ids: must be at least 0"),
    ({"stop_token_ids": ["a"]}, TypeError, "stop_token_ids: a list of whole numbers"),
    ({"ignore_eos": 1}, TypeError, "ignore_eos: true or false"),
    ({"seed": 1.0}, TypeError, "seed: a whole number or None"),
]


@pytest.mark.parametrize(("fields", "error", "message"), WRONG, ids=lambda value: str(value))
def test_a_wrong_field_is_named(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SamplingParams(**fields)


def test_edges_are_allowed() -> None:
    SamplingParams(top_k=-1, top_p=1, min_p=0, temperature=0, min_tokens=16, stop="x", stop_token_ids=(), seed=-3)
