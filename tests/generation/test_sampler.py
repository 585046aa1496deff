"""Sampling: what the filters leave, what is drawn from it, and the log-probs reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast.generation import SamplingParams
from rlhf_fast.generation.sampler import Sampler, draw, filtered

NO_STOP = torch.tensor([], dtype=torch.int64)


def sampler(params: SamplingParams, rows: int, stop_ids: Tensor = NO_STOP, prompt: list[int] | None = None) -> Sampler:
    return Sampler(params, [prompt or [0]] * rows, list(range(rows)), [0] * rows, stop_ids)


def kept(logits: list[float], **filters: Any) -> list[int]:
    return filtered(torch.tensor([logits]), **filters)[0].isfinite().nonzero()[:, 0].tolist()


LOGITS = torch.tensor([0.5, 0.05, 0.2, 0.25]).log().tolist()


@pytest.mark.parametrize(
    ("filters", "tokens"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 0}, [0, 1, 2, 3]),
        ({"top_k": -1}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.4}, [0]),  # the first token alone exceeds it
        ({"top_p": 0.6}, [0, 3]),
        ({"top_p": 0.8}, [0, 2, 3]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.45}, [0, 3]),
        ({"min_p": 1.0}, [0]),
        # top_p counts what the filters before it left: 0.5 and 0.25 are 2/3 and 1/3
        ({"top_k": 2, "top_p": 0.65}, [0]),
        ({"min_p": 0.45, "top_p": 0.65}, [0]),
        ({"top_p": 0.65}, [0, 3]),
    ],
)
def test_what_the_filters_leave(filters: dict[str, Any], tokens: list[int]) -> None:
    assert kept(LOGITS, **filters) == tokens


def test_ties() -> None:
    assert kept([1.0, 1.0, 0.0, 1.0], top_k=1) == [0, 1, 3]  # as in vLLM
    assert kept([0.0, 0.0, 0.0, 0.0], top_p=0.5) == [0, 1]


def test_the_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    logits = torch.tensor(LOGITS).expand(7, 4)
    uniform = torch.tensor([0.0, 0.49999, 0.50001, 0.5499, 0.5501, 0.7499, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniform).tolist() == [0, 0, 1, 1, 2, 2, 3]


def test_a_filtered_token_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, 5)
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniform).tolist() == [1, 3, 3]


def chi_square(tokens: Tensor, probabilities: Tensor) -> float:
    """How far counts are from what is expected, in standard deviations of the chi-square statistic."""
    held = probabilities > 0
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert counts[~held].sum() == 0
    expected = probabilities[held].double() * len(tokens)
    statistic = ((counts[held] - expected).square() / expected).sum()
    freedom = max(int(held.sum()) - 1, 1)
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


PARAMS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 7},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.5, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    {"repetition_penalty": 2.0},
]


@pytest.mark.parametrize("fields", PARAMS, ids=str)
def test_frequencies_are_those_of_the_filtered_softmax(fields: dict[str, Any]) -> None:
    rows, seen = 20000, [1, 4]
    logits = 2 * torch.randn(24, generator=torch.Generator().manual_seed(3))
    params = SamplingParams(**fields)
    tokens, logprobs, sampled = sampler(params, rows, prompt=seen)(logits.expand(rows, -1), 0)

    changed = logits.clone()
    for token in seen:
        penalty = params.repetition_penalty
        changed[token] = changed[token] / penalty if changed[token] > 0 else changed[token] * penalty
    changed = changed / params.temperature
    left = filtered(changed[None], min_p=params.min_p, top_k=params.top_k, top_p=params.top_p)[0].softmax(-1)
    assert abs(chi_square(tokens, left)) < 4
    if fields:  # the test sees a wrong temperature, and a filter that does nothing
        assert chi_square(tokens, (changed * 1.15).softmax(-1)) > 10

    torch.testing.assert_close(logprobs, (logits / params.temperature).log_softmax(-1)[tokens], rtol=0, atol=1e-5)
    torch.testing.assert_close(sampled, left.log()[tokens], rtol=0, atol=1e-5)


def test_greedy_reports_log_probs_at_temperature_1() -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    tokens, logprobs, sampled = sampler(SamplingParams(temperature=0, top_p=0.1), 5)(logits, 0)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))
    torch.testing.assert_close(sampled, logprobs)


def test_before_min_tokens_nothing_that_stops_is_drawn() -> None:
    logits, stop_ids = torch.tensor([[9.0, 9.0, 0.0, 0.0]]).repeat(50, 1), torch.tensor([0, 1])
    draws = sampler(SamplingParams(min_tokens=2), 50, stop_ids)
    for position in range(2):
        tokens, logprobs, sampled = draws(logits, position)
        assert set(tokens.tolist()) == {2, 3}
        torch.testing.assert_close(logprobs, logits.log_softmax(-1)[:, 2])  # of the policy
        torch.testing.assert_close(sampled, torch.full((50,), 0.5).log())  # of the draw
    tokens, logprobs, sampled = draws(logits, 2)
    assert set(tokens.tolist()) == {0, 1}
    assert torch.equal(logprobs, sampled)


def test_the_penalty_remembers_what_was_drawn() -> None:
    logits = torch.tensor([[1.0, 0.9, -1.0]])
    greedy = sampler(SamplingParams(temperature=0, repetition_penalty=1.2), 1, prompt=[2])
    assert [int(greedy(logits, position)[0]) for position in range(3)] == [0, 1, 0]


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    params, seeds, samples = SamplingParams(top_p=0.9), [7, 7, 8, 9, 7, 8], [0, 1, 0, 0, 2, 1]

    def draws(rows: list[int]) -> list[list[int]]:
        some = Sampler(params, [[0]] * len(rows), [seeds[r] for r in rows], [samples[r] for r in rows], NO_STOP)
        return torch.stack([some(logits[rows], position)[0] for position in range(70)], dim=1).tolist()

    whole = draws(list(range(6)))
    assert len({tuple(row) for row in whole}) == 6
    assert draws([4, 2]) == [whole[4], whole[2]]
