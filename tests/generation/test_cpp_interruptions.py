"""What ends a call of the C++ decoder early: abort, Ctrl-C, errors. The generator works on after each.

Abort and Ctrl-C are to be obeyed within a tenth of a second. That is held without a clock: between two looks at the
flag lies a bounded number of multiply-adds, and the look that sees it ends the work.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from rlhf_fast.errors import NonFiniteError
from rlhf_fast.generation import Completion, Generator, SamplingParams, cpp_backend
from rlhf_fast.generation.abort import AbortFlag
from rlhf_fast.generation.decoded import Request
from rlhf_fast.generation.model_spec import describe
from rlhf_fast.generation.stop_strings import StopStrings
from tests.conftest import byte_tokenizer
from tests.families import SHAPES, tiny_model
from tests.generation.test_cpp_backend import PROMPTS

# A core of AVX2 does these multiply-adds in 10 to 30 ms.
BETWEEN_LOOKS = 2**28

LONG = {"15M": 50_000, "SmolLM2-135M": 8_000}  # prompts that take a core a minute or more


# Of a long prompt's work nearly all is attention.
WIDE = {"num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 32}


@functools.lru_cache(maxsize=1)
def model_of(shape: str) -> Any:
    changes = WIDE if shape == "wide" else SHAPES[shape]
    return tiny_model("llama", **changes | {"max_position_embeddings": 2_000_000})


def multiply_adds(model: Any, prompts: list[list[int]], new: int) -> int:
    """Of products and attention, for `new` tokens after each prompt."""
    config, total = model.config, 0
    block = sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() == 2)
    for prompt in prompts:
        tokens = len(prompt) + new - 1
        seen = tokens * (tokens + 1) // 2
        total += config.num_hidden_layers * (tokens * block + 2 * seen * config.num_attention_heads * config.head_dim)
        total += new * config.vocab_size * config.hidden_size
    return total


CASES = {  # shape, prompts, new tokens: what most of the work is
    "products of a prompt": ("SmolLM2-135M", [[5] * 512], 1),
    "attention of a long prompt": ("wide", [[5] * 10_000], 1),
    "head of a batch": ("15M", [[5, i] for i in range(64)], 3),
    "layers of a batch": ("SmolLM2-135M", [[5, i] for i in range(64)], 2),
}


@pytest.mark.parametrize("case", CASES)
def test_work_between_two_looks_at_the_flag_is_bounded(case: str) -> None:
    shape, prompts, new = CASES[case]
    model, flag = model_of(shape), AbortFlag()
    spec = describe(model, len(prompts[0]), len(prompts[0]) + new)
    requests = [Request(i, new, seed=i, sample=0) for i in range(len(prompts))]

    def decode() -> tuple[Any, int]:
        decoded, counts = cpp_backend.decode(
            spec,
            prompts,
            requests,
            SamplingParams(),
            stop_ids=[],
            watchers=None,
            abort=flag,
            max_batch_size=64,
            cache_bytes=None,
        )
        return decoded, counts.looks

    decoded, looks = decode()
    assert decoded.mask.all()
    assert looks >= multiply_adds(model, prompts, new) / BETWEEN_LOOKS

    flag.set()
    decoded, looks = decode()
    assert looks == 1  # and nothing was done
    assert decoded.finish_reasons == ["abort"] * len(prompts)
    assert not decoded.mask.any()


@contextmanager
def on_start(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> Iterator[None]:
    """`act` in a thread, a moment after the decoder has begun."""
    begun, decode = threading.Event(), cpp_backend.decode

    def decode_and_say(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        return decode(*args, **kwargs)

    def wait_and_act() -> None:
        begun.wait()
        threading.Event().wait(0.1)
        act()

    thread = threading.Thread(target=wait_and_act, daemon=True)  # or a call that never begins would hang the tests
    with monkeypatch.context() as patch:
        patch.setattr(cpp_backend, "decode", decode_and_say)
        thread.start()
        yield
    thread.join()


def endless(shape: str, phase: str) -> tuple[list[list[int]], SamplingParams]:
    """What takes a minute or hours, all of it in one phase."""
    prompts = [[5 + i % 7 for i in range(LONG[shape])]] if phase == "prefill" else PROMPTS
    return prompts, SamplingParams(max_tokens=100_000, ignore_eos=True)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("shape", SHAPES)
def test_abort_from_another_thread(shape: str, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(model_of(shape), backend="cpp")
    prompts, params = endless(shape, phase)
    with on_start(monkeypatch, generator.abort):
        rollout = generator.rollout(prompts, params)
    assert rollout.finish_reasons == ["abort"] * len(prompts)
    if phase == "prefill":
        assert not rollout.mask.any()
        assert generator.stats.prefilled_tokens < len(prompts[0])
    assert generator.rollout(PROMPTS, SamplingParams(max_tokens=2, ignore_eos=True)).mask.all()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("shape", SHAPES)
def test_ctrl_c(shape: str, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(model_of(shape), backend="cpp")
    prompts, params = endless(shape, phase)
    with (
        pytest.raises(KeyboardInterrupt),
        on_start(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT)),
    ):
        generator.rollout(prompts, params)
    assert generator.rollout(PROMPTS, SamplingParams(max_tokens=2, ignore_eos=True)).mask.all()


def test_abort_from_another_thread_keeps_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    generator = Generator(model, tokenizer, backend="cpp", max_batch_size=2)
    started, aborted, calls, result = threading.Event(), threading.Event(), 0, []
    add = StopStrings.add

    def wait_at_the_third_step(self: StopStrings, token: int) -> bool:
        nonlocal calls
        calls += 1
        if calls == 6:  # of two rows
            started.set()
            aborted.wait(timeout=60)
        return add(self, token)

    def run(tokens: int) -> list[Completion]:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=2, stop="never said")
        return generator.generate(PROMPTS, params)

    monkeypatch.setattr(StopStrings, "add", wait_at_the_third_step)
    thread = threading.Thread(target=lambda: result.extend(run(80)))
    thread.start()
    assert started.wait(timeout=60)
    generator.abort()
    aborted.set()
    thread.join(timeout=60)
    completions: list[Completion] = result
    assert [c.finish_reason for c in completions] == ["abort"] * 4
    assert [len(c.token_ids) for c in completions] == [3, 3, 0, 0]  # two rows waited for a place
    again = run(5)
    assert [c.finish_reason for c in again] == ["length"] * 4
    assert again[0].token_ids[:3] == completions[0].token_ids


def test_an_exception_in_a_stop_watcher_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: StopStrings, token: int) -> bool:
        raise RuntimeError("not today")

    tokenizer = byte_tokenizer()
    generator = Generator(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer, backend="cpp")
    with monkeypatch.context() as patch:
        patch.setattr(StopStrings, "add", fail)
        with pytest.raises(RuntimeError, match="not today"):
            generator.rollout(PROMPTS, SamplingParams(stop="x", max_tokens=4))
    assert generator.rollout(PROMPTS, SamplingParams(max_tokens=4, ignore_eos=True)).mask.all()


def test_a_cache_below_one_row_is_an_error_that_says_what_it_takes() -> None:
    page = 2 * 2 * 16 * (8 + 16) * 4  # layers, heads, positions, a key and a padded value, fp32
    params = SamplingParams(max_tokens=20, ignore_eos=True, seed=0)
    generator = Generator(tiny_model("llama"), backend="cpp", cache_bytes=4 * page - 1)
    with pytest.raises(ValueError, match=f"cache_bytes: .* 40 prompt tokens and 20 new ones; that takes {4 * page}"):
        generator.rollout(PROMPTS, params)
    short = generator.rollout(PROMPTS[:3], params)
    assert short.mask.all()
    generator.cache_bytes = 4 * page
    assert torch.equal(generator.rollout(PROMPTS, params).tokens[:3], short.tokens)


BAD: dict[str, tuple[list[list[int]], dict[str, Any], str]] = {
    "empty prompt": ([[3], []], {}, "prompt 1 is empty"),
    "id above": ([[3, 64]], {}, r"prompt 0: token id 64 is out of range; the model has ids 0 to 63"),
    "id below": ([[3], [-1]], {}, "prompt 1: token id -1 is out of range"),
    "no room": ([[3] * 128], {}, "prompt 0 has 128 tokens; the model's context holds 128"),
    "no tokens": (PROMPTS, {"max_tokens": 0}, "max_tokens: must be at least 1, got 0"),
    "contradiction": (PROMPTS, {"min_tokens": 5, "max_tokens": 4}, r"min_tokens: must be from 0 to max_tokens \(4\)"),
    "nothing to draw": (PROMPTS, {"min_tokens": 1, "stop_token_ids": range(64)}, "min_tokens: every token is a stop"),
    "no tokenizer": (PROMPTS, {"stop": "x"}, "stop: stop strings need a tokenizer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_named_and_leave_the_generator_as_it_was(case: str) -> None:
    prompts, fields, message = BAD[case]
    generator, params = Generator(tiny_model("llama"), backend="cpp"), SamplingParams(max_tokens=4, seed=0)
    before = generator.rollout(PROMPTS, params)
    with pytest.raises(ValueError, match=message):
        generator.rollout(prompts, SamplingParams(**fields))
    assert torch.equal(generator.rollout(PROMPTS, params).tokens, before.tokens)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["model.norm", "model.layers.1.mlp.down_proj", "model.embed_tokens", "lm_head"])
def test_weights_that_are_not_finite(where: str, value: float) -> None:
    model = tiny_model("llama")
    generator, params = Generator(model, backend="cpp"), SamplingParams(max_tokens=4, seed=0)
    before = generator.rollout(PROMPTS, params)
    weight = model.get_submodule(where).weight
    with torch.no_grad():
        kept = weight.clone()
        weight.copy_(torch.where(weight > 0, value, weight))
    with pytest.raises(NonFiniteError, match="logits are NaN"):
        generator.rollout(PROMPTS, params)
    with torch.no_grad():
        weight.copy_(kept)
    assert torch.equal(generator.rollout(PROMPTS, params).tokens, before.tokens)
