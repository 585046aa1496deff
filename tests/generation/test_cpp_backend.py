"""The C++ decoder: transformers' numbers for every family, whatever the batch, the cache and the order."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_fast.generation import Generator, Rollout, SamplingParams
from rlhf_fast.models import PolicyModel
from tests.families import tiny_model

PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10], list(range(2, 42))]

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 5.0, 9.0, 20.0],
}

# family, what differs from tests/families.py
SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 7 * 2, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 3, "num_key_value_heads": 3}),
    ("llama", {"vocab_size": 77, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_key_value_heads": 1}),
    ("qwen3", {}),
    ("qwen3", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("mistral", {}),
    ("mistral", {"sliding_window": 20, "num_key_value_heads": 1}),
    ("mistral", {"sliding_window": None}),
    ("gpt2", {}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "num_attention_heads": 2, "activation_function": "relu"}),
    ("gemma2", {}),
    ("gemma2", {"attn_logit_softcapping": 1.0, "num_key_value_heads": 4, "query_pre_attn_scalar": 3}),
    ("gemma3", {"num_hidden_layers": 7}),  # five local layers, a global one, a local one
    ("opt", {}),
    ("opt", {"word_embed_proj_dim": 32}),
    ("gpt_neox", {}),
    ("gpt_neox", {"use_parallel_residual": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    ("phi3", {}),
    ("phi3", {"sliding_window": 6, "num_key_value_heads": 1}),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 96}),
    ("cohere", {}),
    ("granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}),
]


def recomputed(model: Any, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Log-probs [B, T] from transformers' full forward, as training has them."""
    input_ids, rows, positions, ids = rollout.sequences(pad_id=0)
    with torch.no_grad():
        return rollout.scatter(PolicyModel(model)(input_ids, rows, positions, ids, temperature=temperature)[0])


def same(a: Rollout, b: Rollout) -> bool:
    """Equal to the last bit."""
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "mask", "logprobs"))


def assert_numbers_of_training(
    model: Any, generator: Generator, max_tokens: int, prompts: list[list[int]] = PROMPTS
) -> Rollout:
    """Log-probs of drawn tokens are the training forward's, greedy tokens its likeliest. Gives the drawn ones, at
    temperature 0.9."""
    rollout = generator.rollout(prompts, SamplingParams(n=2, max_tokens=max_tokens, temperature=0.9, seed=3))
    drift = (rollout.logprobs - recomputed(model, rollout, 0.9))[rollout.mask].abs()
    assert drift.max() <= 1e-4
    assert drift.mean() <= 1e-5
    assert generator.stats.backend == "cpp"

    greedy = generator.rollout(prompts, SamplingParams(temperature=0, max_tokens=max_tokens))
    input_ids, rows, positions, ids = greedy.sequences(pad_id=0)
    with torch.no_grad():
        logits = model(input_ids).logits[rows, positions]
    assert (logits.amax(dim=-1) - logits.gather(1, ids[:, None])[:, 0]).max() <= 1e-4  # the likeliest, but for ties
    return rollout


@pytest.mark.parametrize(("family", "changes"), SHAPES, ids=str)
def test_numbers_are_those_of_transformers(family: str, changes: dict[str, Any]) -> None:
    model = tiny_model(family, **changes)
    assert_numbers_of_training(model, Generator(model, backend="cpp", max_batch_size=3), max_tokens=40)


def test_prompts_past_longropes_first_context_take_its_long_factors() -> None:
    model = tiny_model("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16)
    generator = Generator(model, backend="cpp")
    assert_numbers_of_training(model, generator, max_tokens=20, prompts=[list(range(2, 19)), list(range(2, 60))])
    with pytest.raises(ValueError, match="rows that pass 16 tokens"):
        generator.rollout([list(range(2, 18)), list(range(2, 60))], SamplingParams(max_tokens=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_in_half_precision_it_rounds_where_training_does(family: str, dtype: torch.dtype) -> None:
    """It differs from the training forward by what rounding does to sums in another order, as transformers' own
    decoding with a cache does, and by less than the same weights do with activations in float32."""
    size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 64}
    model = tiny_model(family, dtype, initializer_range=0.08, vocab_size=1000, **size)
    params = SamplingParams(n=4, max_tokens=40, seed=3, ignore_eos=True)

    def drift(decoding: Any, backend: Any) -> Tensor:
        rollout = Generator(decoding, backend=backend).rollout(PROMPTS, params)
        return (rollout.logprobs - recomputed(model, rollout))[rollout.mask].abs().mean()

    ours, theirs, unrounded = drift(model, "cpp"), drift(model, "transformers"), drift(deepcopy(model).float(), "cpp")
    assert ours < 1.05 * theirs
    assert ours < 0.9 * unrounded


def test_greedy_is_transformers_generate() -> None:
    model = tiny_model("llama")
    params = SamplingParams(temperature=0, max_tokens=60)
    ours, theirs = (Generator(model, backend=backend).rollout(PROMPTS, params) for backend in ("cpp", "transformers"))
    assert torch.equal(ours.tokens, theirs.tokens)
    assert ours.finish_reasons == theirs.finish_reasons


def test_samples_are_those_of_the_python_sampler() -> None:
    model = tiny_model("qwen3")
    params = SamplingParams(
        n=3,
        max_tokens=30,
        min_tokens=5,
        temperature=1.2,
        top_p=0.9,
        top_k=20,
        min_p=0.01,
        repetition_penalty=1.2,
        seed=7,
    )
    ours, theirs = (Generator(model, backend=backend).rollout(PROMPTS, params) for backend in ("cpp", "transformers"))
    assert torch.equal(ours.tokens, theirs.tokens)
    torch.testing.assert_close(ours.sampled_logprobs, theirs.sampled_logprobs, rtol=0, atol=1e-4)


# ---- a row does not depend on what is around it ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_row_is_the_same_alone_in_a_batch_in_any_order_and_in_a_small_cache(family: str) -> None:
    model = tiny_model(family)
    lengths = torch.randint(1, 40, (32,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [[(7 * i + 3 * j) % 60 + 2 for j in range(length)] for i, length in enumerate(lengths)]
    params = SamplingParams(n=2, max_tokens=50)
    seeds = list(range(32))
    whole = Generator(model, backend="cpp", max_batch_size=64).rollout(prompts, params, seeds=seeds)

    small = Generator(model, backend="cpp", max_batch_size=64, cache_bytes=200_000)
    assert same(small.rollout(prompts, params, seeds=seeds), whole)
    assert small.stats.evictions > 0  # rows had to wait, and some to start over
    assert small.stats.peak_cache_bytes <= 200_000

    order = torch.randperm(32, generator=torch.Generator().manual_seed(2)).tolist()
    other = Generator(model, backend="cpp", max_batch_size=5).rollout(
        [prompts[i] for i in order], params, seeds=[seeds[i] for i in order]
    )
    rows = [2 * i + j for i in order for j in range(2)]
    width = other.tokens.shape[1]
    assert torch.equal(other.tokens, whole.tokens[rows, :width])
    assert torch.equal(other.logprobs, whole.logprobs[rows, :width])

    for i in (0, 17, 31):
        alone = Generator(model, backend="cpp").rollout([prompts[i]], SamplingParams(max_tokens=50), seeds=[seeds[i]])
        width = alone.tokens.shape[1]
        assert torch.equal(alone.tokens[0], whole.tokens[2 * i, :width])
        assert torch.equal(alone.logprobs[0], whole.logprobs[2 * i, :width])


def test_equal_beginnings_are_computed_once() -> None:
    model, beginning = tiny_model("llama"), list(range(2, 42))
    params = SamplingParams(n=8, max_tokens=20, seed=4)
    generator = Generator(model, backend="cpp")
    rollout = generator.rollout([beginning], params)
    assert generator.stats.prefilled_tokens == 40
    assert generator.stats.prompt_tokens == 8 * 40
    assert same(rollout, Generator(model, backend="cpp", max_batch_size=3).rollout([beginning], params))
    assert (rollout.logprobs - recomputed(model, rollout)).abs().max() <= 1e-4

    # Three prompts with 40 tokens in common: two full pages of 16 are shared, the rest is each one's own.
    prompts = [[*beginning, *end] for end in ([3], [4, 5, 6], list(range(2, 22)))]
    generator = Generator(model, backend="cpp")
    rollout = generator.rollout(prompts, params)
    assert generator.stats.prefilled_tokens == 41 + (43 - 32) + (60 - 32)
    assert (rollout.logprobs - recomputed(model, rollout)).abs().max() <= 1e-4


def test_prompts_longer_than_a_pass() -> None:
    model = tiny_model("llama", max_position_embeddings=1024)
    prompts = [[(5 * i + j * j) % 60 + 2 for j in range(length)] for i, length in enumerate((700, 300, 1, 256, 257))]
    generator = Generator(model, backend="cpp", max_batch_size=3)
    rollout = generator.rollout(prompts, SamplingParams(n=2, max_tokens=20, seed=0))
    assert (rollout.logprobs - recomputed(model, rollout)).abs().max() <= 1e-4


# ---- the model's own weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_changed_in_place_are_seen(family: str) -> None:
    model = tiny_model(family)
    generator, params = Generator(model, backend="cpp"), SamplingParams(max_tokens=20, seed=0, ignore_eos=True)
    before = generator.rollout(PROMPTS, params)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    after = generator.rollout(PROMPTS, params)
    assert (before.logprobs[:, 0] - after.logprobs[:, 0]).abs().max() > 0.01
    assert (after.logprobs - recomputed(model, after)).abs().max() <= 1e-4


def replaced_linear(model: Any) -> None:
    class Adapted(nn.Linear):
        pass

    model.model.layers[1].mlp.up_proj = Adapted(32, 48, bias=False)


def hooked(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda *_: None)


def transposed_weight(model: Any) -> None:
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = nn.Parameter(projection.weight.detach().T.contiguous().T)


UNSUPPORTED: list[tuple[str, dict[str, Any], Any, str]] = [
    ("phi", {}, None, "PhiForCausalLM is not among its families"),
    ("llama", {"hidden_act": "quick_gelu"}, None, "activation 'quick_gelu'"),
    (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 42},
        None,
        "rope_scaling 'longrope' of rows that pass 42 tokens",
    ),
    ("cohere", {"use_qk_norm": True}, None, "norms of queries and keys"),
    ("opt", {"do_layer_norm_before": False}, None, "do_layer_norm_before"),
    ("llama", {}, replaced_linear, "Adapted in place of a linear layer"),
    ("llama", {}, hooked, r"model\.layers\.0 has forward hooks"),
    ("llama", {}, transposed_weight, "a Linear whose weight is not contiguous"),
    ("llama", {}, lambda model: model.double(), "weights in float64"),
]


@pytest.mark.parametrize(("family", "changes", "change", "reason"), UNSUPPORTED, ids=[case[3] for case in UNSUPPORTED])
def test_what_it_does_not_know_goes_to_transformers_with_a_reason(
    family: str, changes: dict[str, Any], change: Any, reason: str, recwarn: pytest.WarningsRecorder
) -> None:
    model = tiny_model(family, **changes)
    if change is not None:
        change(model)
    params = SamplingParams(max_tokens=3, seed=0)
    with pytest.raises(ValueError, match=f"backend 'cpp': .*{reason}"):
        Generator(model, backend="cpp").rollout(PROMPTS, params)
    generator = Generator(model)
    recwarn.clear()
    for _ in range(2):
        generator.rollout(PROMPTS, params)
    said = [str(warning.message) for warning in recwarn if "instead of C++" in str(warning.message)]
    assert len(said) == 1
    assert generator.stats.backend == "transformers"


# ---- counts --------------------------------------------------------------------------------------------------------


def test_stats_count() -> None:
    generator = Generator(tiny_model("llama"), max_batch_size=2)
    generator.rollout(PROMPTS[:3], SamplingParams(max_tokens=6, ignore_eos=True))
    stats = generator.stats
    assert (stats.backend, stats.prompt_tokens, stats.prefilled_tokens, stats.generated_tokens) == ("cpp", 12, 12, 18)
    assert stats.peak_cache_bytes == 2 * (2 * 2 * 16 * (8 + 16) * 4)  # two rows of one page
