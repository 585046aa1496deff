"""distinct-n by hand."""

from __future__ import annotations

import pytest

from rlhf_fast.tracking import distinct_n


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b a b", "c"], 1, 3 / 5),
        (["a b a b", "c"], 2, 2 / 5),  # ab, ba; none across texts
        (["same reply"] * 100, 2, 1 / 200),
        (["你好你好"], 2, 2 / 4),  # 你好, 好你
        (["สวัสดี ok"], 1, 6 / 7),  # six characters, one of them twice, and a word
        ([[1, 2, 3], [1, 2]], 2, 2 / 5),
        (["a"], 2, 0.0),
        ([], 2, 0.0),
        ([""], 1, 0.0),
    ],
)
def test_distinct_n(texts: list[str], n: int, expected: float) -> None:
    assert distinct_n(texts, n) == pytest.approx(expected)


def test_n_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        distinct_n(["a"], 0)
