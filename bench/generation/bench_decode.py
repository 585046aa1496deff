"""Decoding with a KV cache on the CPU: milliseconds a step, sampling at temperature 1, random weights.

Decode and prefill are timed apart: a round generates one token, then all of them, and the difference is the steps after
the first. pytest-benchmark's clock runs only by that difference, divided by the steps.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.generation.decoders import (
    PEERS,
    Generate,
    Job,
    with_ctranslate2,
    with_generator,
    with_llama_cpp,
    with_transformers,
)
from bench.generation.shapes import SHAPES

OURS, FLOOR = "rlhf_fast", "floor: one read of the weights"
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
TOLERANCE = {FLOAT32: 1e-4, BFLOAT16: 0.2}  # of logits; their standard deviation is about 1


@dataclass(frozen=True)
class Case:
    """`rows` completions, n of each prompt, decoded together; of `tokens` tokens, or ragged: of 1 to `tokens`."""

    shape: str
    dtype: torch.dtype
    rows: int
    rounds: int
    prompt: int = 64
    n: int = 1
    tokens: int = 64
    ragged: bool = False

    def __str__(self) -> str:
        text = f"{self.shape} {str(self.dtype).removeprefix('torch.')}, batch {self.rows}"
        text += f", n={self.n} of a prompt of {self.prompt}" if self.n > 1 else ""
        return text + (f", 1 to {self.tokens} tokens" if self.ragged else "")

    @property
    def decoders(self) -> list[str]:
        names = [OURS, "transformers' generate"]
        if self.shape == "15M" and self.dtype == FLOAT32:  # it differs from the line above by its sampling alone
            names.append("Generator on transformers")
        if (PEERS / ".made").is_file():
            names.append("llama.cpp")
        if (
            self.dtype == FLOAT32
            and self.n == 1
            and not self.ragged
            and [*PEERS.glob("lib/*/site-packages/ctranslate2")]
        ):
            names.append("CTranslate2")
        return names


N8 = Case("15M", FLOAT32, rows=16, rounds=2, prompt=256, n=8)
CASES = [
    *[Case("15M", dtype, rows, rounds) for dtype in (FLOAT32, BFLOAT16) for rows, rounds in ((1, 5), (16, 2), (64, 1))],
    Case("15M", FLOAT32, rows=64, rounds=1, ragged=True),
    N8,
    *[Case("110M", dtype, rows, 1, prompt=8, tokens=9) for dtype in (FLOAT32, BFLOAT16) for rows in (1, 16, 64)],
    *[Case("SmolLM2-135M", dtype, rows, 1, prompt=8, tokens=9) for dtype in (FLOAT32, BFLOAT16) for rows in (1, 16)],
]
PREFILL_CASES = [
    *[Case("15M", dtype, rows=16, rounds=3) for dtype in (FLOAT32, BFLOAT16)],
    *[Case("110M", dtype, rows=16, rounds=1) for dtype in (FLOAT32, BFLOAT16)],
    N8,
]


@functools.lru_cache(maxsize=1)
def model(shape: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """Weights large enough that every layer has a say in what comes next, unlike transformers' initial ones."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], initializer_range=0.05, bos_token_id=None, eos_token_id=None)
    return LlamaForCausalLM(config).to(dtype).eval()


@functools.lru_cache
def job_and_lengths(case: Case) -> tuple[Job, list[int]]:
    """Random prompts, and the tokens that each row gets."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = SHAPES[case.shape]["vocab_size"]
    prompts = torch.randint(vocabulary, (case.rows // case.n, case.prompt), generator=generator).tolist()
    job, lengths = Job(prompts, case.n), [case.tokens] * case.rows
    if not case.ragged:
        return job, lengths
    # A row's stop token is what it draws at a random position; another row's may end it before. The first has none.
    weights = model(case.shape, case.dtype)
    ends = torch.randint(case.tokens, (case.rows - 1,), generator=generator).tolist()
    with with_generator(weights, job, "cpp") as generate:
        drawn = generate(lengths, False)
        job = Job(prompts, case.n, tuple(row[end] for row, end in zip(drawn[1:], ends, strict=True)))
    with with_generator(weights, job, "cpp") as generate:
        return job, [len(row) for row in generate(lengths, False)]


def read(weights: Sequence[Tensor]) -> None:
    for weight in weights:
        weight.view(torch.int32).sum(dtype=torch.int32)


class Clock:
    """A timer that runs by what it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


def timed(generate: Generate, lengths: Sequence[int]) -> tuple[float, int]:
    """Seconds, and how many tokens came."""
    started = time.perf_counter()
    tokens = generate(lengths, False)
    return time.perf_counter() - started, sum(map(len, tokens))


def decoder(name: str, case: Case, job: Job, folder: Path) -> AbstractContextManager[Generate]:
    weights = model(case.shape, case.dtype)
    if name == "llama.cpp":
        return with_llama_cpp(weights, job, case.prompt + case.tokens, folder)
    if name == "CTranslate2":
        return with_ctranslate2(weights, job, folder)
    if name == "transformers' generate":
        return with_transformers(weights, job)
    return with_generator(weights, job, "cpp" if name == OURS else "transformers")


def assert_greedy(case: Case, prompts: list[list[int]], tokens: list[list[int]]) -> None:
    """No token's logit is below the largest one, in transformers' forward of the same weights in float32."""
    whole = torch.tensor([prompt + row for prompt, row in zip(prompts, tokens, strict=True)])
    exact = copy.deepcopy(model(case.shape, case.dtype)).float()
    with torch.no_grad():
        logits = exact(whole, logits_to_keep=len(tokens[0]) + 1).logits[:, :-1]
    chosen = logits.gather(-1, torch.tensor(tokens)[..., None])[..., 0]
    assert (logits.amax(dim=-1) - chosen).max() < TOLERANCE[case.dtype]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(
    ("case", "name"), [(case, name) for case in CASES for name in [*case.decoders, FLOOR]], ids=str
)
def test_decode_step(benchmark: Any, tmp_path: Path, case: Case, name: str) -> None:
    benchmark.group, benchmark.param = f"decode step, {case}", name
    weights = list(model(case.shape, case.dtype).parameters())
    benchmark.extra_info["bytes"] = sum(weight.nbytes for weight in weights)
    if name == FLOOR:

        def floor() -> None:
            started = time.perf_counter()
            read(weights)
            CLOCK.now += time.perf_counter() - started

        benchmark.pedantic(floor, rounds=10, warmup_rounds=1)
        return

    job, lengths = job_and_lengths(case)
    with decoder(name, case, job, tmp_path) as generate:
        greedy = generate([4] * case.rows, True)  # warms up as well
        if name in (OURS, "llama.cpp", "CTranslate2"):
            assert_greedy(case, job.prompts[:4], greedy[:: case.n][:4])

        def step() -> None:
            first, _ = timed(generate, [1] * case.rows)
            whole, tokens = timed(generate, lengths)
            CLOCK.now += (whole - first) / (max(lengths) - 1)
            assert tokens == pytest.approx(sum(lengths), rel=0.1)  # transformers may draw past a stop token of ours

        benchmark.pedantic(step, rounds=case.rounds)


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in PREFILL_CASES for name in case.decoders], ids=str)
def test_prefill(benchmark: Any, tmp_path: Path, case: Case, name: str) -> None:
    """The prompts, and one token drawn for each row."""
    benchmark.group, benchmark.param = f"prefill {case.rows // case.n}x{case.prompt}, {case}", name
    job, _ = job_and_lengths(case)
    with decoder(name, case, job, tmp_path) as generate:
        benchmark.pedantic(generate, ([1] * case.rows, False), rounds=case.rounds, warmup_rounds=1)
