"""The C++ decoder over thousands of requests and in tight caches: nothing is lost, nothing is kept, seeds hold.

Each call of the decoder itself fails if a page of the cache was not returned. The long versions are `slow`.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast.generation import Generator, Rollout, SamplingParams
from tests.conftest import byte_tokenizer
from tests.families import SHAPES, tiny_model

MB = 1_000_000


def resident() -> int:
    """Bytes of memory that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def peak() -> Iterator[list[int]]:
    """Gives a list that afterwards holds the most memory that the process had meanwhile."""
    found: list[int] = []
    Path("/proc/self/clear_refs").write_text("5")  # the mark goes down to what there is now
    yield found
    lines = Path("/proc/self/status").read_text().splitlines()
    found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))


def rows_of(rollout: Rollout) -> list[tuple[list[int], list[float]]]:
    return [
        (tokens[mask].tolist(), logprobs[mask].tolist())
        for tokens, mask, logprobs in zip(rollout.tokens, rollout.mask, rollout.logprobs, strict=True)
    ]


class Requests:
    """Random calls of a small model: lengths, shared beginnings, all options, stop strings, budgets, aborts."""

    def __init__(self, family: str, seed: int):
        self.random = random.Random(seed)
        self.tokenizer = byte_tokenizer()
        self.vocabulary = len(self.tokenizer)
        self.model = tiny_model(family, vocab_size=self.vocabulary, max_position_embeddings=160)
        self.row_bytes = 10 * 2 * 4 * 16 * (8 + 16) * 4  # pages, layers, heads at most, positions, key and value, fp32
        self.evictions = 0

    def prompts(self) -> list[list[int]]:
        beginning = self.tokens(self.random.randrange(60))
        count = self.random.randint(1, 8)
        prompts = [self.tokens(self.random.randint(1, 60)) for _ in range(count)]
        return [beginning + prompt if self.random.random() < 0.5 else prompt for prompt in prompts]

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(5, self.vocabulary) for _ in range(count)]

    def params(self) -> SamplingParams:
        choose, number = self.random.choice, self.random.random
        max_tokens = self.random.randint(1, 50)
        return SamplingParams(
            n=choose([1, 1, 2, 3, 8]),
            temperature=choose([0.0, 0.3, 1.0, 1.7]),
            top_p=choose([1.0, 1.0, 0.5 + number() / 2]),
            top_k=choose([0, 0, 1, self.random.randint(2, 100)]),
            min_p=choose([0.0, 0.0, number() / 10]),
            repetition_penalty=choose([1.0, 1.0, 0.5 + number()]),
            max_tokens=max_tokens,
            min_tokens=choose([0, 0, self.random.randint(0, max_tokens)]),
            stop=choose([None, None, "e", ["。", "ab", "xyz"], "<|user|>"]),
            stop_token_ids=choose([None, [7, 100]]),
            ignore_eos=choose([False, True]),
        )

    def generator(self, **options: Any) -> Generator:
        return Generator(self.model, self.tokenizer, backend="cpp", **options)

    def run(self) -> int:
        """One call; returns its number of requests."""
        prompts, params = self.prompts(), self.params()
        seeds = [self.random.randrange(2**64) for _ in prompts]
        budget = self.random.choice([None, self.row_bytes, self.row_bytes * self.random.randint(2, 10)])
        generator = self.generator(max_batch_size=self.random.randint(1, 16), cache_bytes=budget)
        wanted = self.random.random() < 0.2
        aborting = threading.Timer(self.random.random() / 50, generator.abort) if wanted else None
        if aborting:
            aborting.start()
        rollout = generator.rollout(prompts, params, seeds=seeds)
        if aborting:
            aborting.join()
        self.evictions += generator.stats.evictions
        assert budget is None or generator.stats.peak_cache_bytes <= budget
        self.check(rollout, params, aborted=wanted)
        if self.random.random() < 0.2:
            self.check_seeds(rollout, prompts, params, seeds)
        return len(rollout.lengths)

    def check(self, rollout: Rollout, params: SamplingParams, *, aborted: bool) -> None:
        assert rollout.mask.sum(dim=1).equal(rollout.mask.cumprod(dim=1).sum(dim=1))  # no holes
        assert torch.isfinite(rollout.logprobs).all()
        for reason, length in zip(rollout.finish_reasons, rollout.lengths.tolist(), strict=True):
            assert reason != "abort" or aborted
            assert length <= params.max_tokens
            assert reason != "length" or length == params.max_tokens
            assert reason != "stop" or length >= params.min_tokens

    def check_seeds(self, rollout: Rollout, prompts: list[list[int]], params: SamplingParams, seeds: list[int]) -> None:
        """Row by row the same with a prompt by itself and room for all, as far as an aborted row came."""
        i = self.random.randrange(len(prompts))
        alone = rows_of(self.generator().rollout([prompts[i]], params, seeds=[seeds[i]]))
        there = rows_of(rollout)[i * params.n : (i + 1) * params.n]
        reasons = rollout.finish_reasons[i * params.n : (i + 1) * params.n]
        for (tokens, logprobs), (wanted, wanted_logprobs), reason in zip(there, alone, reasons, strict=True):
            length = len(tokens)
            assert reason == "abort" or length == len(wanted)
            assert tokens == wanted[:length]
            assert logprobs == wanted_logprobs[:length]


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_hundreds_of_random_requests(family: str) -> None:
    many_random_requests(family, 400)  # of memory the tests below: a sanitizer, which this runs under too, has its own


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_ten_thousand_random_requests(family: str) -> None:
    assert many_random_requests(family, 10_000) < 4 * MB


def many_random_requests(family: str, count: int) -> int:
    """How many bytes the process has at the end that it had not after a quarter of the requests."""
    requests, done, before = Requests(family, seed=count), 0, 0
    while done < count:
        done += requests.run()
        if not before and done > count / 4:
            before = resident()
    assert requests.evictions > 0
    return resident() - before


def test_memory_is_flat_over_200_calls() -> None:
    memory_over_calls(tiny_model("llama"), page=2 * 2 * 16 * (8 + 16) * 4)


@pytest.mark.slow
def test_memory_is_flat_over_200_calls_of_a_larger_model() -> None:
    memory_over_calls(tiny_model("llama", **SHAPES["15M"]), page=6 * 6 * 16 * (48 + 48) * 4)


def memory_over_calls(model: Any, *, page: int) -> None:
    """The last 100 calls take less than half a page a call (of `page` bytes) more than those before."""
    prompts = [[5 + (i * 7 + j) % 50 for j in range(90)] for i in range(4)]
    generator = Generator(model, backend="cpp")
    after = []
    for seed in range(200):
        generator.rollout(prompts, SamplingParams(n=2, max_tokens=20, ignore_eos=True, seed=seed))
        generator.release_cache()
        after.append(resident())
    assert max(after[100:]) - max(after[10:100]) < 100 * page / 2


def test_a_calls_cache_is_given_back_with_its_end() -> None:
    model = tiny_model("llama", **SHAPES["15M"] | {"num_hidden_layers": 60})
    params = SamplingParams(n=100, max_tokens=2, ignore_eos=True, seed=0)
    generator = Generator(model, backend="cpp", max_batch_size=100)
    generator.rollout([[5, 6, 7]], params)
    before = resident()
    with peak() as most:
        generator.rollout([[5, 6, 7]], params)
    assert generator.stats.peak_cache_bytes > 200 * MB
    assert most[0] - before > 150 * MB
    assert resident() - before < 10 * MB


def test_long_rows_in_a_cache_that_cannot_hold_them_all() -> None:
    long_rows(tiny_model("llama", max_position_embeddings=512), prompt=200, new=50, budget=2_500_000)


@pytest.mark.slow
def test_32_prompts_of_2000_tokens_in_a_gigabyte() -> None:
    """500 new tokens each: all keys and values together would be 1.1 GB."""
    model = tiny_model("llama", **SHAPES["15M"], max_position_embeddings=2500)
    before = resident()
    with peak() as most:
        long_rows(model, prompt=2000, new=500, budget=1_000 * MB)
    assert 900 * MB < most[0] - before < 1_200 * MB
    assert resident() - before < 100 * MB  # the cache is given back


def long_rows(model: Any, *, prompt: int, new: int, budget: int) -> None:
    drawn = torch.randint(2, 60, (32, prompt), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    generator = Generator(model, backend="cpp", cache_bytes=budget)
    rollout = generator.rollout(drawn, params, seeds=range(32))
    assert rollout.lengths.tolist() == [new] * 32
    assert 0.9 * budget < generator.stats.peak_cache_bytes <= budget
    assert generator.stats.evictions > 0
    for i in (0, 31):  # the first one in, and one that had to wait
        alone = Generator(model, backend="cpp").rollout([drawn[i]], params, seeds=[i])
        assert rows_of(alone) == rows_of(rollout)[i : i + 1]
