"""Do the replies still differ? A policy that found one good answer for everything shows here first."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

# Thai, Lao, Burmese, Khmer, kana and Han put no spaces between words: there every character counts as one.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


def distinct_n(texts: Sequence[str] | Sequence[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams in all texts together, divided by their number of words (Li et al. 2016, arXiv:1510.03055).

    Args:
        texts: strings, cut at white space (scripts without spaces: at every character), or lists of token ids.
        n: length of the n-grams, at least 1.

    Returns:
        0.0 (nothing, or nothing new) to 1.0. n-grams do not cross from one text into the next.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    grams: set[tuple[Hashable, ...]] = set()
    words = 0
    for text in texts:
        tokens = _WORD.findall(text) if isinstance(text, str) else list(text)
        words += len(tokens)
        grams.update(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(grams) / words if words else 0.0
