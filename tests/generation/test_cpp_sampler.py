"""The decoder's sampler draws what sampler.py draws, with the same log-probs, from any logits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_fast.build import load_generation
from rlhf_fast.generation import SamplingParams
from rlhf_fast.generation.philox import uniforms
from rlhf_fast.generation.sampler import Sampler, filtered
from tests.generation.test_sampler import PARAMS, chi_square

FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"temperature": 0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 700},  # more than there are blocks
    {"top_k": 10**6},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "top_p": 0.8},
    {"temperature": 0, "repetition_penalty": 2.0, "min_tokens": 2},
    {"min_tokens": 2},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 2},
]


class Row:
    """One row's sampler in C++, with the tokens that it has seen."""

    def __init__(
        self,
        vocabulary: int,
        params: SamplingParams,
        *,
        seed: int = 0,
        sample: int = 0,
        stop_ids: Sequence[int] = (),
        prompt: Sequence[int] = (0,),
    ):
        self.params, self.seed, self.sample = params, seed, sample
        self.stop_ids = np.array(stop_ids, dtype=np.int32)
        self.seen: NDArray[np.uint64] = np.zeros(-(-vocabulary // 64), dtype=np.uint64)
        for token in prompt:
            self.see(token)

    def see(self, token: int) -> None:
        self.seen[token // 64] |= np.uint64(1) << np.uint64(token % 64)

    def draw(self, logits: Tensor, position: int) -> tuple[int, float, float]:
        """logits [V] -> token, its log-prob in the full distribution and in the one drawn from."""
        assert logits.is_contiguous()
        params = self.params
        drawn: tuple[int, float, float] = load_generation().sample(
            logits=logits.data_ptr(),
            vocabulary=len(logits),
            temperature=params.temperature,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            top_k=params.top_k,
            min_tokens=params.min_tokens,
            stop_ids=self.stop_ids.ctypes.data,
            stop_count=len(self.stop_ids),
            seed=self.seed % 2**64,
            sample=self.sample,
            position=position,
            seen=self.seen.ctypes.data,
        )
        self.see(drawn[0])
        return drawn


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_the_same_tokens_and_log_probs(fields: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(**fields)
    for vocabulary, rows in ((1, 1), (2, 4), (5, 10), (97, 20), (256, 10), (1000, 20), (20011, 2)):
        stop_ids, prompt = [0, vocabulary - 1] if vocabulary > 2 else [], [0, vocabulary // 2]
        for spread in (0.3, 3.0, 12.0):
            seeds, samples = [seed - 2 for seed in range(rows)], [row % 3 for row in range(rows)]
            stop = torch.tensor(stop_ids, dtype=torch.int64)
            python = Sampler(params, [prompt] * rows, seeds, samples, stop, ops_backend="reference")
            cpp = [
                Row(vocabulary, params, seed=seed, sample=sample, stop_ids=stop_ids, prompt=prompt)
                for seed, sample in zip(seeds, samples, strict=True)
            ]
            for position in range(4):
                logits = spread * torch.randn(rows, vocabulary, generator=generator)
                logits[:, 3 : vocabulary // 4] = -torch.inf
                tokens, logprobs, sampled = python(logits, position)
                drawn = [row.draw(logits[i], position) for i, row in enumerate(cpp)]
                assert [row[0] for row in drawn] == tokens.tolist(), (vocabulary, spread, position)
                torch.testing.assert_close(torch.tensor([row[1] for row in drawn]), logprobs, rtol=1e-6, atol=1e-5)
                torch.testing.assert_close(torch.tensor([row[2] for row in drawn]), sampled, rtol=1e-6, atol=1e-5)


def test_a_token_depends_on_seed_sample_and_position_alone() -> None:
    logits = torch.randn(200, generator=torch.Generator().manual_seed(1))

    def tokens(seed: int, sample: int) -> list[int]:
        row = Row(200, SamplingParams(), seed=seed, sample=sample)
        return [row.draw(logits, position)[0] for position in range(70)]

    different = [tokens(7, 0), tokens(7, 1), tokens(8, 0), tokens(7 + 2**32, 0)]
    assert len(set(map(tuple, different))) == 4
    assert tokens(7, 1) == different[1]
    python = Sampler(SamplingParams(), [[0]], [7], [1], torch.tensor([], dtype=torch.int64))
    assert [int(python(logits[None], position)[0]) for position in range(70)] == different[1]


@pytest.mark.parametrize("fields", PARAMS, ids=str)
def test_frequencies_are_those_of_the_filtered_softmax(fields: dict[str, Any]) -> None:
    params, vocabulary, seen = SamplingParams(**fields), 600, [1, 4, 300]  # three blocks
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(3))
    rows = [Row(vocabulary, params, seed=seed, prompt=seen) for seed in range(20000)]
    tokens = torch.tensor([row.draw(logits, 0)[0] for row in rows])

    penalty, changed = params.repetition_penalty, logits.clone()
    changed[seen] = torch.where(changed[seen] > 0, changed[seen] / penalty, changed[seen] * penalty)
    changed = (changed / params.temperature)[None]
    left = filtered(changed, min_p=params.min_p, top_k=params.top_k, top_p=params.top_p)[0].softmax(-1)
    assert abs(chi_square(tokens, left)) < 4
    assert chi_square(tokens, (2 * left.log()).softmax(-1)) > 10  # the test sees a wrong temperature


def test_the_inverse_of_the_cumulative_distribution_to_the_last_token() -> None:
    """Equal weights: token j is drawn exactly when the uniform number lies in [j / V, (j + 1) / V)."""
    for vocabulary in (1, 255, 256, 257, 4096):
        numbers = uniforms(range(500), [0] * 500, 0, 1)[:, 0]
        rows = [Row(vocabulary, SamplingParams(), seed=seed) for seed in range(500)]
        tokens = [row.draw(torch.full((vocabulary,), 3.0), 0)[0] for row in rows]
        assert tokens == np.floor(numbers * vocabulary).astype(int).tolist()


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    logits = torch.zeros(900)
    logits[[700, 400, 401]] = 2.0
    token, logprob, sampled = Row(900, SamplingParams(temperature=0)).draw(logits, 0)
    assert token == 400
    assert logprob == sampled == pytest.approx(float(logits.log_softmax(-1)[400]), abs=1e-6)


def test_ties_at_the_border_of_a_filter() -> None:
    def drawn(logits: list[float], **fields: Any) -> set[int]:
        rows = [Row(len(logits), SamplingParams(**fields), seed=seed) for seed in range(60)]
        return {row.draw(torch.tensor(logits), 0)[0] for row in rows}

    assert drawn([1.0, 1.0, 0.0, 1.0], top_k=1) == {0, 1, 3}
    assert drawn([0.0, 0.0, 0.0, 0.0], top_p=0.5) == {0, 1}
    assert drawn([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]) == {1, 3}
    assert drawn([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf], top_k=4) == {1, 3}


@pytest.mark.parametrize("fields", [{}, {"temperature": 0}, {"top_p": 0.5}, {"top_k": 3}, {"repetition_penalty": 2.0}])
def test_logits_that_are_no_distribution_give_nan(fields: dict[str, Any]) -> None:
    row = Row(300, SamplingParams(**fields))
    for place in (0, 127, 299):
        for wrong in (torch.nan, torch.inf):
            logits = torch.zeros(300)
            logits[place] = wrong
            assert np.isnan(row.draw(logits, 0)[1:]).all()
    assert np.isnan(row.draw(torch.full((300,), -torch.inf), 0)[1:]).all()
    assert np.isfinite(row.draw(torch.zeros(300), 0)[1:]).all()
    overflow = Row(300, SamplingParams(temperature=1e-38, top_k=3))
    assert np.isnan(overflow.draw(torch.full((300,), 5.0), 0)[1:]).all()
    masked = Row(2, SamplingParams(**fields, min_tokens=1), stop_ids=[0, 1])
    assert np.isnan(masked.draw(torch.zeros(2), 0)[1:]).all()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability: str) -> None:
    """The tests above once more, in a process that is told that the CPU is a lesser one."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        return  # this is that process
    if capability.replace("default", "baseline") == load_generation().instruction_set():
        return  # the tests above were run with it
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-k",
        "not frequencies",
        __file__,
    ]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
