"""Generator on real models: equal to transformers where it should be, and to the training forward."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast.errors import NonFiniteError
from rlhf_fast.generation import Completion, Generator, SamplingParams
from rlhf_fast.models import PolicyModel, load_causal_lm, load_tokenizer
from tests.conftest import byte_tokenizer
from tests.families import FAMILIES, VOCABULARY, tiny_model
from tests.generation.test_sampler import chi_square

PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13]]
EOS = 1  # of the tiny families


def scripted_model(script: list[int], vocabulary: int, eos: int | None = None) -> Any:
    """A GPT-2 that says `script`: after p tokens it gives script[p - 1], with a logit that leaves nothing to chance."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = 64
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_embd=size,
            n_positions=size,
            n_layer=1,
            n_head=2,
            tie_word_embeddings=False,
            eos_token_id=eos,
            bos_token_id=None,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        model.transformer.wpe.weight.copy_(torch.eye(size))
        for position, token in enumerate(script):
            model.lm_head.weight[token, position] = 10.0
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_training(family: str) -> None:
    model = tiny_model(family)
    rollout = Generator(model, max_batch_size=3).rollout(
        PROMPTS, SamplingParams(n=2, max_tokens=24, temperature=0.9, seed=3)
    )
    input_ids, rows, positions, ids = rollout.sequences(pad_id=0)
    with torch.no_grad():
        logprobs, _ = PolicyModel(model)(input_ids, rows, positions, ids, temperature=0.9)
    drift = (rollout.logprobs[rollout.mask] - logprobs).abs()
    assert drift.max() <= 1e-4
    assert drift.mean() <= 1e-5
    assert torch.equal(rollout.sampled_logprobs, rollout.logprobs)
    assert (rollout.tokens[~rollout.mask] == 0).all()
    assert (rollout.logprobs[~rollout.mask] == 0).all()
    assert rollout.prompt_ids == [prompt for prompt in PROMPTS for _ in range(2)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "opt", "gemma2"])
def test_greedy_is_transformers_own(family: str) -> None:
    model = tiny_model(family)
    completions = Generator(model).generate(PROMPTS, SamplingParams(temperature=0, max_tokens=15))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        whole = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=15, do_sample=False
        )
        assert completion.token_ids == whole[0, len(prompt) :].tolist()


def test_tokens_depend_on_the_seed_not_on_the_batch() -> None:
    model, params = tiny_model("llama"), SamplingParams(n=2, max_tokens=20, ignore_eos=True)
    seeds = [3, 4, 5, 3]
    whole = Generator(model).rollout(PROMPTS, params, seeds=seeds)
    assert len({tuple(row) for row in whole.tokens.tolist()}) == 8
    for order in ([3, 1, 0, 2], [2], [0, 3]):
        part = Generator(model, max_batch_size=3).rollout(
            [PROMPTS[i] for i in order], params, seeds=[seeds[i] for i in order]
        )
        rows = [2 * i + j for i in order for j in range(2)]
        assert torch.equal(part.tokens, whole.tokens[rows])
    one = Generator(model).rollout(PROMPTS, SamplingParams(max_tokens=20, ignore_eos=True), seeds=seeds)
    assert torch.equal(one.tokens, whole.tokens[::2])  # sample 0 is the same with n = 1


def test_a_model_that_cannot_decode_in_batches_is_decoded_row_by_row() -> None:
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2)).eval()
    with pytest.warns(UserWarning, match="RwkvForCausalLM does not decode in batches"):
        rollout = Generator(model).rollout(PROMPTS, SamplingParams(n=2, max_tokens=6, seed=0))
    with torch.no_grad():
        logprobs = rollout.scatter(PolicyModel(model)(*rollout.sequences(0))[0])
    torch.testing.assert_close(rollout.logprobs, logprobs, rtol=0, atol=1e-4)


def test_seeds() -> None:
    generator = Generator(tiny_model("llama"))
    params = SamplingParams(max_tokens=12, ignore_eos=True)

    def tokens(seed: int | None) -> list[list[int]]:
        return generator.rollout(
            [[5, 6], [5, 6]], SamplingParams(max_tokens=12, ignore_eos=True, seed=seed)
        ).tokens.tolist()

    assert tokens(1)[0] == tokens(1)[1] == tokens(1)[0]  # one seed for each prompt, as in vLLM
    assert tokens(1) != tokens(2)
    torch.manual_seed(0)
    first, second = tokens(None), tokens(None)
    assert first[0] != first[1]
    assert first != second
    torch.manual_seed(0)
    assert tokens(None) == first
    with pytest.raises(ValueError, match=r"seeds: one a prompt was expected \(2\), got 1"):
        generator.rollout([[5], [6]], params, seeds=[1])


def test_frequencies_are_the_models() -> None:
    model = tiny_model("llama")
    rollout = Generator(model, max_batch_size=5000).rollout([[5, 6, 7]], SamplingParams(n=5000, max_tokens=1, seed=1))
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1]
    assert abs(chi_square(rollout.tokens[:, 0], logits.softmax(-1))) < 4
    assert chi_square(rollout.tokens[:, 0], (1.15 * logits).softmax(-1)) > 10


def test_settings_of_the_model_do_not_leak_into_sampling() -> None:
    model, params = tiny_model("llama"), SamplingParams(max_tokens=12, seed=5, ignore_eos=True)
    wanted = Generator(model).rollout(PROMPTS, params)
    settings = {"do_sample": True, "temperature": 0.01, "top_k": 1, "repetition_penalty": 5.0, "max_length": 6}
    model.generation_config.update(**settings, no_repeat_ngram_size=1, suppress_tokens=list(range(30)), min_length=50)
    own = model.generation_config
    assert torch.equal(Generator(model).rollout(PROMPTS, params).tokens, wanted.tokens)
    assert model.generation_config is own


# ---- what ends a completion ------------------------------------------------------------------------------------------


def test_eos_is_kept_and_says_stop() -> None:
    model = scripted_model([5, 6, EOS, 7, 8, 9], VOCABULARY, eos=EOS)
    rollout = Generator(model).rollout([[2], [2, 2], [2, 2, 2, 2]], SamplingParams(max_tokens=3))
    assert rollout.tokens.tolist() == [[5, 6, EOS], [6, EOS, 0], [7, 8, 9]]
    assert rollout.mask.tolist() == [[True] * 3, [True, True, False], [True] * 3]
    assert rollout.finish_reasons == ["stop", "stop", "length"]
    assert rollout.finished.tolist() == [True, True, False]
    assert rollout.lengths.tolist() == [3, 2, 3]


def test_ignored_eos_and_other_stop_tokens() -> None:
    generator = Generator(scripted_model([5, EOS, 6, 7, 8], VOCABULARY, eos=EOS))
    going = generator.generate([[2]], SamplingParams(max_tokens=4, ignore_eos=True))[0]
    assert (going.token_ids, going.finish_reason) == ([5, EOS, 6, 7], "length")
    stopped = generator.generate([[2]], SamplingParams(max_tokens=4, ignore_eos=True, stop_token_ids=[6]))[0]
    assert (stopped.token_ids, stopped.finish_reason) == ([5, EOS, 6], "stop")


def test_min_tokens_puts_eos_off() -> None:
    generator = Generator(scripted_model([EOS] * 20, VOCABULARY, eos=EOS))
    completion = generator.generate([[2]], SamplingParams(max_tokens=9, min_tokens=4))[0]
    assert len(completion.token_ids) == 5
    assert completion.token_ids.index(EOS) == 4


def test_the_call_ends_with_the_last_row() -> None:
    model, steps = scripted_model([5, EOS] * 10, VOCABULARY, eos=EOS), 0
    generator = Generator(model, backend="transformers")
    generator.rollout([[2], [2, 2]], SamplingParams(max_tokens=50))

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    model.transformer.register_forward_hook(count)
    generator.rollout([[2], [2, 2]], SamplingParams(max_tokens=50))
    assert steps == 2


def test_a_stop_string_split_over_tokens_ends_the_text_before_it() -> None:
    tokenizer = byte_tokenizer()
    said = tokenizer("你好。再见了")["input_ids"]
    generator = Generator(scripted_model(said, len(tokenizer)), tokenizer)
    prompt = tokenizer("x")["input_ids"]
    cut, whole, early = (
        generator.generate([prompt], SamplingParams(max_tokens=18, stop=stop))[0]
        for stop in ("。再", "没有", ["了", "好"])
    )
    assert (cut.text, cut.finish_reason, cut.token_ids) == ("你好", "stop", said[:12])
    assert len(cut.logprobs) == 12
    assert (whole.text, whole.finish_reason) == ("你好。再见了", "length")
    assert (early.text, early.token_ids) == ("你", said[:6])


def test_a_special_token_as_stop_string_stops_by_its_id() -> None:
    tokenizer = byte_tokenizer()
    said = [*tokenizer("ab")["input_ids"], tokenizer.convert_tokens_to_ids("<|user|>"), *tokenizer("cd")["input_ids"]]
    generator = Generator(scripted_model(said, len(tokenizer)), tokenizer)
    completion = generator.generate([[6]], SamplingParams(max_tokens=5, stop="<|user|>"))[0]
    assert (completion.text, completion.finish_reason, completion.token_ids) == ("ab", "stop", said[:3])


def test_text_prompts_and_texts(tiny_llama: Path) -> None:
    model, tokenizer = load_causal_lm(tiny_llama, dtype="float32"), load_tokenizer(tiny_llama)
    generator = Generator(model, tokenizer)
    completions = generator.generate(["你好", "hi"], SamplingParams(n=2, max_tokens=8, seed=0))
    assert [c.prompt_ids for c in completions] == [tokenizer(t)["input_ids"] for t in ("你好", "你好", "hi", "hi")]
    for completion in completions:
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert len(completion.logprobs) == len(completion.token_ids) == len(completion.sampled_logprobs)


def test_a_completion_ends_where_the_context_does() -> None:
    model = tiny_model("gpt2")  # 128 positions; one more would be an index error
    prompts = [[3] * 120, [4] * 5, [5] * 127]
    params = SamplingParams(max_tokens=20, ignore_eos=True, seed=1)
    rollout = Generator(model).rollout(prompts, params)
    assert rollout.lengths.tolist() == [8, 20, 1]
    assert rollout.finish_reasons == ["length"] * 3
    assert torch.equal(Generator(model).rollout(prompts[:1], params).tokens, rollout.tokens[:1, :8])


def test_abort_from_another_thread_keeps_what_is_there() -> None:
    model = tiny_model("llama")
    generator = Generator(model, backend="transformers", max_batch_size=2)
    generator.rollout(PROMPTS, SamplingParams(max_tokens=1))
    started, aborted, calls, result = threading.Event(), threading.Event(), 0, []

    def wait_at_the_third_step(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            started.set()
            aborted.wait(timeout=60)

    hook = model.model.register_forward_hook(wait_at_the_third_step)

    def run() -> None:
        result.extend(generator.generate(PROMPTS, SamplingParams(max_tokens=100, ignore_eos=True, seed=2)))

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(timeout=60)
    generator.abort()
    aborted.set()
    thread.join(timeout=60)
    hook.remove()
    completions: list[Completion] = result
    assert [c.finish_reason for c in completions] == ["abort"] * 4
    assert sorted(len(c.token_ids) for c in completions) == [0, 0, 3, 3]  # the second batch was not reached
    again = generator.generate(PROMPTS, SamplingParams(max_tokens=5, ignore_eos=True, seed=2))
    assert [c.finish_reason for c in again] == ["length"] * 4
    first = next(i for i, c in enumerate(completions) if c.token_ids)
    assert again[first].token_ids[:3] == completions[first].token_ids


# ---- the model is used in place --------------------------------------------------------------------------------------


def test_an_optimiser_step_is_seen_by_the_next_call() -> None:
    model = tiny_model("llama").train()
    policy = PolicyModel(model)
    generator, params = Generator(policy), SamplingParams(max_tokens=10, seed=0, ignore_eos=True)
    before = generator.rollout(PROMPTS, params)
    assert model.training
    assert model.model.layers[0].training
    optimiser = torch.optim.SGD(policy.parameters(), lr=0.5)
    inputs = before.sequences(0)
    (-policy(*inputs)[0].mean()).backward()
    optimiser.step()
    after = generator.rollout(PROMPTS, params)
    inputs = after.sequences(0)
    with torch.no_grad():
        recomputed = after.scatter(policy(*inputs)[0])
    assert (before.logprobs[:, 0] - after.logprobs[:, 0]).abs().max() > 0.01
    torch.testing.assert_close(after.logprobs, recomputed, rtol=0, atol=1e-4)


def test_dropout_of_a_model_in_training_does_not_act() -> None:
    model, params = tiny_model("gpt2"), SamplingParams(max_tokens=10, seed=0, ignore_eos=True)
    wanted = Generator(model).rollout(PROMPTS, params)
    assert torch.equal(Generator(model.train()).rollout(PROMPTS, params).logprobs, wanted.logprobs)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_half_precision_has_an_fp32_head(family: str) -> None:
    model = tiny_model(family, torch.bfloat16)
    prompt = torch.tensor([[5, 6, 7]])
    generator = Generator(model, backend="transformers")
    rollout = generator.rollout(prompt.tolist(), SamplingParams(max_tokens=1, seed=0, n=4))
    token = rollout.tokens[:, 0]
    nothing = torch.zeros(4, dtype=torch.int64)
    with torch.no_grad():
        exact, _ = PolicyModel(model)(prompt, nothing, nothing + 2, token)
        rounded = model(prompt).logits[0, -1].float().log_softmax(-1)[token]
    torch.testing.assert_close(rollout.logprobs[:, 0], exact, rtol=0, atol=1e-4)
    assert (rounded - exact).abs().max() > 1e-3  # what is avoided, and the head is the model's own again


def test_stats_count() -> None:
    generator = Generator(tiny_model("llama"), backend="transformers", max_batch_size=2)
    generator.rollout(PROMPTS, SamplingParams(max_tokens=6, ignore_eos=True))
    generator.release_cache()
    stats = generator.stats
    assert (stats.backend, stats.prompt_tokens, stats.generated_tokens) == ("transformers", 15, 24)
    assert stats.tokens_per_s > 0
    # two layers of two heads of eight fp32 numbers, keys and values, for two rows of the longest prompt and six tokens
    assert stats.peak_cache_bytes == 2 * 2 * 2 * 8 * 4 * 2 * (8 + 6)


# ---- what cannot be done ---------------------------------------------------------------------------------------------


def test_wrong_requests_are_named() -> None:
    generator, params = Generator(tiny_model("gpt2")), SamplingParams()
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generator.generate([[3], []], params)
    with pytest.raises(ValueError, match=r"prompt 0: token id 64 is out of range; the model has ids 0 to 63"):
        generator.generate([[3, 64]], params)
    with pytest.raises(ValueError, match="token id -1 is out of range"):
        generator.generate([[-1]], params)
    with pytest.raises(ValueError, match=r"prompt 1 has 128 tokens; the model's context holds 128"):
        generator.rollout([[3], [3] * 128], params)
    with pytest.raises(ValueError, match="text need a tokenizer"):
        generator.generate(["hello"], params)
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        generator.generate([[3]], SamplingParams(stop="x"))
    with pytest.raises(ValueError, match="backend: 'auto', 'cpp', 'cuda' or 'transformers'"):
        Generator(tiny_model("gpt2"), backend="vllm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_batch_size"):
        Generator(tiny_model("gpt2"), max_batch_size=0)
    with pytest.raises(ValueError, match="cache_bytes: must be at least 1, got 0"):
        Generator(tiny_model("gpt2"), cache_bytes=0)
    with pytest.raises(TypeError, match="a causal language model was expected, got Linear"):
        Generator(torch.nn.Linear(2, 2))


def test_no_prompts() -> None:
    generator = Generator(tiny_model("llama"))
    assert generator.generate([], SamplingParams()) == []
    assert generator.rollout([], SamplingParams()).tokens.shape == (0, 0)


def test_nan_weights_are_an_error_and_the_model_is_put_back() -> None:
    model = tiny_model("llama").train()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    own = model.generation_config
    with pytest.raises(NonFiniteError, match="logits are NaN"):
        Generator(model).rollout(PROMPTS, SamplingParams(max_tokens=3))
    assert model.training
    assert model.generation_config is own
