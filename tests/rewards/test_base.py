"""What counts as scores, and what a person reads when it does not."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_fast.errors import RewardError
from rlhf_fast.rewards import FunctionReward
from rlhf_fast.rewards.base import checked_scores

PROMPTS = ["Who are you?", "你好", "x" * 100]
COMPLETIONS = ["I am a program.", "你好！", "y" * 100]


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5, -2],
        (1, 0.5, -2),
        [True, 0.5, -2],
        [np.float32(1), np.float16(0.5), np.int64(-2)],
        [np.bool_(True), Fraction(1, 2), -2],
        [torch.tensor(1), torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(-2)],
        np.array([1, 0.5, -2]),
        torch.tensor([1, 0.5, -2], dtype=torch.float64),
        torch.tensor([1, 0.5, -2], requires_grad=True),
    ],
)
def test_numbers_of_all_kinds(returned: Any) -> None:
    scores = checked_scores("reward f", returned, PROMPTS, COMPLETIONS)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert scores.tolist() == [1, 0.5, -2]


ROW_0 = r"row 0 \(prompt 'Who are you\?', completion 'I am a program.'\)"
ROW_1 = r"row 1 \(prompt '你好', completion '你好！'\)"
ROW_2 = r"row 2 \(prompt 'x{60}'\.\.\., completion 'y{60}'\.\.\.\)"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"reward f returned None \(is a `return` missing\?\)\. 3 finite numbers were expected\."),
        ("0.5", r"returned '0.5' \(a str\), not a list"),
        (0.5, r"returned 0.5 \(a float\), not a list"),
        ({"scores": [1, 2, 3]}, r"\(a dict\), not a list"),
        ((x for x in [1, 2, 3]), r"\(a generator\), not a list"),
        (torch.tensor(1.0), r"returned a Tensor of shape \[\], not \[3\]"),
        (torch.zeros(3, 1), r"returned a Tensor of shape \[3, 1\], not \[3\]"),
        (np.zeros((1, 3)), r"returned a ndarray of shape \[1, 3\], not \[3\]"),
        ([], rf"returned 0 scores for 3 completions: none at {ROW_0}"),
        ([1, 2], rf"returned 2 scores for 3 completions: none at {ROW_2}"),
        ([1, 2, 3, 4], r"returned 4 scores for 3 completions\."),
        (torch.zeros(2), rf"returned 2 scores for 3 completions: none at {ROW_2}"),
        ([1, None, 3], rf"returned None \(TRL reads None as 'does not apply'.*0\.0 for instance\) at {ROW_1}"),
        (["1", 2, 3], rf"returned '1' \(a str\) at {ROW_0}"),
        ([1, [2], 3], rf"returned \[2\] \(a list\) at {ROW_1}"),
        ([1, 2, Decimal(3)], rf"returned Decimal\('3'\) \(a Decimal\) at {ROW_2}"),
        ([1, 2j, 3], rf"returned 2j \(a complex\) at {ROW_1}"),
        ([1, torch.zeros(1), 3], rf"returned tensor\(\[0\.\]\) \(a Tensor\) at {ROW_1}"),
        ([1, 2, float("nan")], rf"returned nan at {ROW_2}"),
        ([1, float("-inf"), 3], rf"returned -inf at {ROW_1}"),
        (torch.tensor([1, 2, float("inf")]), rf"returned inf at {ROW_2}"),
        ([10**400, 2, 3], r"returned inf at row 0"),
        ([1, 1e39, 3], rf"returned 1e\+39, too large for float32, at {ROW_1}"),
        ([1, object(), 3], rf"returned <object object at .* \(a object\) at {ROW_1}"),
    ],
)
def test_everything_else_is_named(returned: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        checked_scores("reward f", returned, PROMPTS, COMPLETIONS)


def test_rows_of_a_part_of_the_batch_are_counted_from_its_start() -> None:
    with pytest.raises(RewardError, match="row 65"):
        checked_scores("reward f", [0.0, None], ["a", "b"], ["c", "d"], first_row=64)


def test_a_conversation_is_shown_by_its_last_message() -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    with pytest.raises(RewardError, match=r"row 0 \(prompt 'Why\?', completion 'So\.'\)"):
        checked_scores("reward f", [None], [prompt], ["So."])


def test_an_empty_batch_asks_nobody() -> None:
    def explode(completions: list[str]) -> list[float]:
        raise AssertionError

    scores = FunctionReward(explode).score([], [])
    assert scores.total.shape == (0,)
    assert {name: part.shape for name, part in scores.parts.items()} == {"explode": (0,)}


def test_columns_must_fit() -> None:
    reward = FunctionReward(lambda completions, **columns: [0.0] * len(completions), name="zero")
    with pytest.raises(RewardError, match=r"a column called 'completions'.*Rename the column"):
        reward.score(["a"], ["b"], completions=["c"])
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        reward.score(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="column 'answer' has 2 values for 1 completions"):
        reward.score(["a"], ["b"], answer=[1, 2])
