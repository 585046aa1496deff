"""Tiny random models of the families that are tried everywhere, by name."""

from __future__ import annotations

from typing import Any

import torch

from bench.generation import shapes

VOCABULARY = 64
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # logits that differ by whole units
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_WIDE = {"head_dim": 8}

# name -> (config class, its own settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", _WIDE),
    "mistral": ("MistralConfig", {"sliding_window": 4}),
    "gpt2": ("GPT2Config", {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
    "gemma2": ("Gemma2Config", {**_WIDE, "final_logit_softcapping": 3.0, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", {**_WIDE, "final_logit_softcapping": 3.0, "sliding_window": 4}),
    "opt": ("OPTConfig", {"word_embed_proj_dim": 16, "ffn_dim": 48, "dropout": 0.5, "layerdrop": 0.5}),
    "gpt_neox": ("GPTNeoXConfig", {"attention_dropout": 0.5, "hidden_dropout": 0.5}),
    "phi3": ("Phi3Config", {"resid_pdrop": 0.5}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),  # a bias on the head
}

# For tiny_model("llama", **...).
SHAPES = {name: {**shapes.SHAPES[name], "initializer_range": 0.02} for name in ("15M", "SmolLM2-135M")}


def tiny_config(family: str, **changes: Any) -> Any:
    """The transformers config of a tiny model of that family, with some settings changed."""
    import transformers

    name, settings = FAMILIES[family]
    return getattr(transformers, name)(**{**_COMMON, **settings, **changes})


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random model in eval mode. Biases and norms are random too, so that a forgotten one shows."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    # transformers before 5.21 chooses SDPA for Gemma 2 too, which leaves out the cap of the scores.
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif family == "opt" and "embed" in name:
                parameter.mul_(1.5)
    return model.to(dtype).eval()
