"""A Llama's weights as the file that llama.cpp reads (GGUF), in their own dtype; no vocabulary: ids go in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: Any, path: Path) -> None:
    """`model`: a LlamaForCausalLM with a tied head, float32 or bfloat16."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    _add(writer, "token_embd", model.model.embed_tokens.weight)
    _add(writer, "output_norm", model.model.norm.weight)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for i, layer in enumerate(model.model.layers):
        for module, name in _LAYER.items():
            weight = layer.get_submodule(module).weight
            _add(writer, f"blk.{i}.{name}", _interleaved(weight, heads[name]) if name in heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads, 2, half] as [heads, half, 2]: transformers rotates the halves of a head, llama.cpp neighbours."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add(writer: Any, name: str, weight: Tensor) -> None:
    """Norms are always float32 there."""
    weight = weight.detach()
    if weight.dtype == torch.bfloat16 and weight.dim() == 2:
        data = weight.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(f"{name}.weight", weight.float().contiguous().numpy())
