"""sample: the tokens and log-probs of the CPU decoder's sampler, from the same logits."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast.generation import SamplingParams
from rlhf_fast.generation.philox import uniforms
from tests.cuda import structures
from tests.cuda_on_cpu.device import Device
from tests.generation.test_cpp_sampler import FIELDS, Row

INFINITY = torch.inf


@dataclass
class Drawn:
    tokens: Tensor
    logprobs: Tensor
    sampled: Tensor
    logits: Tensor  # scaled and capped


class Batch:
    """Rows of one SamplingParams in guarded memory, with the tokens that each has seen."""

    def __init__(
        self,
        device: Device,
        vocabulary: int,
        params: SamplingParams,
        *,
        seeds: Sequence[int],
        samples: Sequence[int] | None = None,
        stop_ids: Sequence[int] = (),
        prompt: Sequence[int] = (0,),
    ) -> None:
        self.device, self.vocabulary, self.params = device, vocabulary, params
        rows = len(seeds)
        self.stop_ids = device.tensor(torch.tensor(stop_ids, dtype=torch.int32))
        self.seeds = device.tensor(torch.tensor(seeds, dtype=torch.int64))
        self.samples = device.tensor(torch.tensor(samples or [0] * rows, dtype=torch.int32))
        self.sets = device.tensor(torch.zeros(rows, -(-vocabulary // 64), dtype=torch.int64))
        for row in self.sets:
            for token in prompt:
                row[token // 64] |= 1 << token % 64 if token % 64 < 63 else -(1 << 63)
        self.seen = device.tensor(torch.tensor([row.data_ptr() for row in self.sets]))

    def draw(self, logits: Tensor, position: int, *, scale: float = 1, cap: float = 0) -> Drawn:
        """logits [rows, vocabulary]; `position`: of each row."""
        device, params, rows = self.device, self.params, len(logits)
        options = structures.SamplingOptions(
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.top_k,
            params.min_tokens,
            self.stop_ids.data_ptr(),
            len(self.stop_ids),
        )
        logits = device.tensor(logits)
        positions = device.tensor(torch.full([rows], position, dtype=torch.int32))
        tokens = device.empty(rows, dtype=torch.int32)
        logprobs, sampled = device.empty(rows), device.empty(rows)
        arrays = (self.seeds, self.samples, positions, self.seen, tokens, logprobs, sampled)
        kernels = device.load("sample.cu")
        workspace = device.empty(kernels.sample_workspace(rows, self.vocabulary), dtype=torch.uint8)
        kernels.sample(
            logits,
            rows,
            self.vocabulary,
            c_float(scale),
            c_float(cap),
            options,
            structures.Sampling(*(array.data_ptr() for array in arrays)),
            workspace,
            None,
        )
        return Drawn(tokens, logprobs, sampled, logits)


def reference(logits: Tensor, rows: Sequence[Row], position: int) -> tuple[list[int], Tensor, Tensor]:
    """The CPU decoder's sampler on each row."""
    drawn = [row.draw(row_logits.clone(), position) for row, row_logits in zip(rows, logits, strict=True)]
    tokens, logprobs, sampled = zip(*drawn, strict=True)
    return list(tokens), torch.tensor(logprobs), torch.tensor(sampled)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_the_cpu_s_tokens_and_log_probs(device: Device, fields: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(**fields)
    for vocabulary, rows, spread in ((1, 1, 0.3), (2, 3, 12.0), (97, 4, 0.3), (1000, 3, 12.0), (20011, 1, 0.3)):
        stop_ids, prompt = [0, vocabulary - 1] if vocabulary > 2 else [], [0, vocabulary // 2]
        seeds, samples = [seed - 2 for seed in range(rows)], [row % 3 for row in range(rows)]
        batch = Batch(device, vocabulary, params, seeds=seeds, samples=samples, stop_ids=stop_ids, prompt=prompt)
        cpu = [
            Row(vocabulary, params, seed=seed, sample=sample, stop_ids=stop_ids, prompt=prompt)
            for seed, sample in zip(seeds, samples, strict=True)
        ]
        for position in (1, 2):
            logits = spread * torch.randn(rows, vocabulary, generator=generator)
            logits[:, 3 : vocabulary // 4] = -INFINITY
            drawn = batch.draw(logits, position)
            tokens, logprobs, sampled = reference(logits, cpu, position)
            assert drawn.tokens.tolist() == tokens, (vocabulary, spread, position)
            torch.testing.assert_close(drawn.logprobs, logprobs, rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(drawn.sampled, sampled, rtol=1e-6, atol=1e-5)
        if params.repetition_penalty != 1:
            assert batch.sets.tolist() == [row.seen.view("int64").tolist() for row in cpu]


@pytest.mark.parametrize("fields", [{}, {"temperature": 0}, {"top_k": 50, "top_p": 0.95}, {"top_p": 0.999}], ids=str)
def test_a_large_vocabulary(device: Device, fields: dict[str, Any]) -> None:
    params, vocabulary = SamplingParams(**fields), 128 * 1024 + 1
    logits = 2.5 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(5))
    drawn = Batch(device, vocabulary, params, seeds=[3]).draw(logits, 0)
    tokens, logprobs, sampled = reference(logits, [Row(vocabulary, params, seed=3)], 0)
    assert drawn.tokens.tolist() == tokens
    torch.testing.assert_close(drawn.logprobs, logprobs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(drawn.sampled, sampled, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("fields", [*FIELDS[::5], FIELDS[-1]], ids=str)
def test_a_row_alone_has_the_bits_that_it_has_among_others(device: Device, fields: dict[str, Any]) -> None:
    params, rows, vocabulary = SamplingParams(**fields), 3, 700
    logits = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(2))
    together = Batch(device, vocabulary, params, seeds=range(rows), stop_ids=[9]).draw(logits, 1)
    assert together.logprobs.isfinite().all()
    assert together.sampled.isfinite().all()
    for row in range(rows):
        alone = Batch(device, vocabulary, params, seeds=[row], stop_ids=[9]).draw(logits[row : row + 1], 1)
        assert torch.equal(alone.tokens, together.tokens[row : row + 1])
        assert torch.equal(alone.logprobs, together.logprobs[row : row + 1])
        assert torch.equal(alone.sampled, together.sampled[row : row + 1])


@pytest.mark.parametrize(("scale", "cap"), [(0.5, 0.0), (1.0, 30.0), (2.0, 5.0)])
def test_logits_are_scaled_and_capped_in_place(device: Device, scale: float, cap: float) -> None:
    params, vocabulary = SamplingParams(top_k=9), 300
    logits = 4 * torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(8))
    expected = cap * (scale * logits / cap).tanh() if cap else scale * logits
    drawn = Batch(device, vocabulary, params, seeds=[0, 1]).draw(logits, 0, scale=scale, cap=cap)
    torch.testing.assert_close(drawn.logits, expected, rtol=1e-6, atol=1e-6)
    tokens, logprobs, _ = reference(expected, [Row(vocabulary, params, seed=seed) for seed in range(2)], 0)
    assert drawn.tokens.tolist() == tokens
    torch.testing.assert_close(drawn.logprobs, logprobs, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 4096])
def test_the_inverse_of_the_cumulative_distribution_to_the_last_token(device: Device, vocabulary: int) -> None:
    """Equal weights: token j is drawn exactly when the uniform number lies in [j / V, (j + 1) / V)."""
    numbers = torch.from_numpy(uniforms(range(20), [0] * 20, 7, 1)[:, 0])
    batch = Batch(device, vocabulary, SamplingParams(), seeds=range(20))
    drawn = batch.draw(torch.full((20, vocabulary), 3.0), 7)
    assert drawn.tokens.tolist() == (numbers * vocabulary).floor().int().tolist()


def test_what_falls_on_a_chunk_s_end_is_a_token_that_can_be_drawn(device: Device) -> None:
    """A chunk's sum and that of its tokens round differently; each row's number lies where the first chunk ends."""
    rows, head = 64, torch.randn(100, generator=torch.Generator().manual_seed(1))
    logits = torch.full((rows, 257), -INFINITY)
    logits[:, :100] = head
    numbers = torch.from_numpy(uniforms(range(rows), [0] * rows, 0, 1)[:, 0])
    logits[:, 256] = (head.double().logsumexp(0) + (1 - numbers).log() - numbers.log()).float()
    drawn = Batch(device, 257, SamplingParams(), seeds=range(rows)).draw(logits, 0)
    assert set(drawn.tokens.tolist()) == {99, 256}
    assert drawn.logprobs.isfinite().all()


def test_greedy_takes_the_lowest_of_equal_tokens(device: Device) -> None:
    logits = torch.zeros(1, 900)
    logits[0, [700, 400, 401]] = 2.0
    drawn = Batch(device, 900, SamplingParams(temperature=0), seeds=[0]).draw(logits, 0)
    assert drawn.tokens.tolist() == [400]
    assert drawn.logprobs.tolist() == drawn.sampled.tolist()
    assert float(drawn.logprobs) == pytest.approx(float(logits.log_softmax(-1)[0, 400]), abs=1e-6)


@pytest.mark.parametrize(
    ("logits", "fields", "left"),
    [
        ([1.0, 1.0, 0.0, 1.0], {"top_k": 1}, {0, 1, 3}),
        ([0.0, 0.0, 0.0, 0.0], {"top_p": 0.5}, {0, 1}),
        ([0.0, -0.0, 0.0, -0.0], {"top_p": 0.5}, {0, 1}),
        ([-INFINITY, 0.0, -INFINITY, 0.0, -INFINITY], {}, {1, 3}),
        ([-INFINITY, 0.0, -INFINITY, 0.0, -INFINITY], {"top_k": 4}, {1, 3}),
    ],
)
def test_ties_at_the_border_of_a_filter(
    device: Device, logits: list[float], fields: dict[str, Any], left: set[int]
) -> None:
    batch = Batch(device, len(logits), SamplingParams(**fields), seeds=range(24))
    assert set(batch.draw(torch.tensor(logits).repeat(24, 1), 0).tokens.tolist()) == left


@pytest.mark.parametrize("fields", [{}, {"temperature": 0}, {"top_p": 0.5}, {"top_k": 3}, {"repetition_penalty": 2.0}])
def test_logits_that_are_no_distribution_give_nan(device: Device, fields: dict[str, Any]) -> None:
    logits = torch.zeros(8, 300)
    for row, (place, wrong) in enumerate((place, wrong) for place in (0, 127, 299) for wrong in (torch.nan, INFINITY)):
        logits[row, place] = wrong
    logits[6] = -INFINITY
    drawn = Batch(device, 300, SamplingParams(**fields), seeds=range(8)).draw(logits, 0)
    assert drawn.logprobs.isnan().tolist() == [True] * 7 + [False]
    assert drawn.sampled.isnan().tolist() == [True] * 7 + [False]
    assert ((drawn.tokens >= 0) & (drawn.tokens < 300)).all()
    masked = Batch(device, 2, SamplingParams(**fields, min_tokens=1), seeds=[0], stop_ids=[0, 1])
    assert masked.draw(torch.zeros(1, 2), 0).logprobs.isnan().all()
    assert masked.draw(torch.zeros(1, 2), 1).logprobs.isfinite().all()


def test_logits_that_overflow_when_divided_give_nan(device: Device) -> None:
    batch = Batch(device, 300, SamplingParams(temperature=1e-38, top_k=3), seeds=[0])
    assert batch.draw(torch.full((1, 300), 5.0), 0).logprobs.isnan().all()
