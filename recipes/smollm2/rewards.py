"""The reward: how positive a reply sounds (VADER, Hutto and Gilbert 2014). Beside it, with weight 0, what cheating it
would move: words piled up for their sentiment, and replies that no longer speak of what was asked."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_WORD = re.compile(r"[a-z0-9]+(?:['’][a-z]+)*")
_COMMON_WORDS = """
a about am an and are as at be been but by can could did do does else for from had has have he her him his how i if in
into is it its just let like many me more most much my name named no not of on one or our she should so some tell than
that the their them then there they this to us was we were what when where which who whom whose why will with would you
your
"""
_COMMON = frozenset(_COMMON_WORDS.split())


@cache
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError("the package vaderSentiment is missing: pip install vaderSentiment") from error
    return SentimentIntensityAnalyzer()


def words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def sentiment(completions: list[str], **columns: Any) -> list[float]:
    """VADER's compound score of the reply: -1 (all negative) to 1 (all positive); 0 for an empty one."""
    return [float(_vader().polarity_scores(text)["compound"]) for text in completions]


def sentiment_words(completions: list[str], **columns: Any) -> list[float]:
    """The share of words that VADER's lexicon has, either sign: a tenth in plain English, most of them in
    "great, great, wonderful"."""
    lexicon = _vader().lexicon
    return [sum(word in lexicon for word in found) / max(1, len(found)) for found in map(words, completions)]


def on_topic(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The share of the prompt's content words, by their first five letters, that the reply takes up; 1 where the prompt
    has none ("How are you?")."""
    shares = []
    for prompt, completion in zip(prompts, completions, strict=True):
        wanted = {word[:5] for word in words(prompt) if word not in _COMMON}
        said = {word[:5] for word in words(completion)}
        shares.append(len(wanted & said) / len(wanted) if wanted else 1.0)
    return shares
