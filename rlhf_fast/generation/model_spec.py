"""A transformers model -> what the C++ decoder needs to know of it: addresses of its weights, and what each block does.

Each family is one function that reads the model's own modules. Numbers that transformers works out (rotary tables,
attention scales, windows) are taken from it, so that they are right by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_fast.build import load_generation
from rlhf_fast.models.head import LMHead

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_ACTIVATIONS = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Their angles do not change with the length; dynamic's only beyond max_position_embeddings, where no row goes.
_ROPE_KINDS = ("default", "linear", "llama3", "yarn", "proportional", "dynamic")


class UnsupportedError(Exception):
    """The C++ decoder does not know this model; the message says which part."""


@dataclass
class Spec:
    """The C++ description, and tensors made for it that must live as long as it is used."""

    model: Any
    made: list[Tensor] = field(default_factory=list)
    linears: dict[int, nn.Module] = field(default_factory=dict)  # with adapters, by their weights' addresses


def describe(model: nn.Module, shortest: int, longest: int, device: str = "cpu") -> Spec:
    """`model`'s description, good until its parameters move. All of them are to lie on that kind of device.

    `shortest`: tokens of the shortest prompt. `longest`: what a sequence grows to at most.

    Raises UnsupportedError. BuildError: the decoder cannot be compiled.
    """
    if _full_name(model) == "peft.peft_model.PeftModelForCausalLM":
        wrapper: Any = model
        if getattr(wrapper.base_model, "prefix", None) == "lora_":
            model = wrapper.get_base_model()  # with its adapters, which are layers of it
    name = type(model).__name__
    if name not in _FAMILIES:
        raise UnsupportedError(f"{name} is not among its families")
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedError(f"{path or name} has forward hooks")
        if "forward" in vars(module):
            raise UnsupportedError(f"{path or name} has a forward of its own")
        if _is_of_peft(module) and _full_name(module) != "peft.tuners.lora.layer.Linear":
            raise UnsupportedError(f"{path} is a {_full_name(module)}; of adapters it knows LoRA's on linear layers")
    return _Describer(model, shortest, longest, device).spec()


def _full_name(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_of_peft(module: Any) -> bool:
    return _full_name(module).startswith("peft.")


class _Describer:
    def __init__(self, model: Any, shortest: int, longest: int, device: str):
        self.model, self.config = model, model.config.get_text_config()
        self.shortest, self.longest, self.device = shortest, longest, device
        self.half = model.dtype in (torch.bfloat16, torch.float16)
        self.cpp: ModuleType = load_generation()
        self.made: list[Tensor] = []
        self.linears: dict[int, nn.Module] = {}
        self.heads = self.cpp.Heads()
        self.layers: list[Any] = []

    def spec(self) -> Spec:
        out = self.cpp.Model()
        _FAMILIES[type(self.model).__name__](self, out)
        output = self.model.get_output_embeddings()
        if _is_of_peft(output):
            raise UnsupportedError("an adapter on the head")
        head = LMHead(self.model)
        out.head = self.linear(output)
        out.logit_scale, out.logit_cap = head.scale, head.softcap or 0.0
        out.vocabulary = output.weight.shape[0]
        out.heads, out.layers = self.heads, self.layers
        out.eager = self.config._attn_implementation.endswith("eager")
        out.type = self.dtype(self.model.get_input_embeddings().weight)
        return Spec(out, self.made, self.linears)

    # ---- parts -------------------------------------------------------------------------------------------------------

    def dtype(self, tensor: Tensor) -> Any:
        if tensor.dtype not in _DTYPES:
            raise UnsupportedError(f"weights in {str(tensor.dtype).removeprefix('torch.')}")
        return getattr(self.cpp.WeightType, _DTYPES[tensor.dtype])

    def plain(self, tensor: Tensor, shape: tuple[int, ...], what: nn.Module) -> Tensor:
        """The tensor, if it lies in memory as its shape says."""
        name = type(what).__name__
        if type(tensor) not in (nn.Parameter, Tensor) or tensor.layout != torch.strided:
            raise UnsupportedError(f"a {name} whose weight is a {type(tensor).__name__}")
        if tensor.device.type != self.device:
            raise UnsupportedError(f"weights on {tensor.device.type}")
        if tuple(tensor.shape) != shape:
            raise UnsupportedError(f"a {name} whose weight is {list(tensor.shape)}, not {list(shape)}")
        if tensor.stride(-1) != 1:
            raise UnsupportedError(f"a {name} whose weight is not contiguous")
        return tensor

    def linear(self, module: Any) -> Any:
        """A linear layer, and the adapter that PEFT has put around it."""
        is_adapted = _is_of_peft(module)
        layer = module.get_base_layer() if is_adapted else module
        described = self.matrix(layer, self.adapter(module) if is_adapted else None)
        self.linears[layer.weight.data_ptr()] = module
        return described

    def matrix(self, module: Any, adapter: Any = None) -> Any:
        if type(module) is nn.Linear:
            transposed, shape = False, (module.out_features, module.in_features)
        elif type(module) is Conv1D:
            transposed, shape = True, (module.nx, module.nf)
        else:
            raise UnsupportedError(f"{type(module).__name__} in place of a linear layer")
        weight, bias = self.plain(module.weight, shape, module), 0
        size_in, size_out = shape if transposed else shape[::-1]
        if module.bias is not None:
            if module.bias.dtype != weight.dtype:
                raise UnsupportedError(f"a bias in {module.bias.dtype} beside weights in {weight.dtype}")
            bias = self.plain(module.bias, (size_out,), module).data_ptr()
        return self.cpp.Linear(
            weight.data_ptr(), self.dtype(weight), size_out, size_in, weight.stride(0), transposed, bias, adapter
        )

    def adapter(self, module: Any) -> Any:
        """What a LoRA layer of PEFT adds; None while it adds nothing: switched off, or merged into the weight."""
        active = [name for name in module.active_adapters if name in module.lora_A]
        if module.disable_adapters or module.merged or not active:
            return None
        if len(active) > 1:
            raise UnsupportedError(f"{len(active)} active adapters on a layer: {', '.join(active)}")
        if active[0] in module.lora_variant:
            raise UnsupportedError(f"a variant of LoRA, {type(module.lora_variant[active[0]]).__name__}")
        down, up = module.lora_A[active[0]], module.lora_B[active[0]]
        if down.weight.dtype not in (torch.float32, module.get_base_layer().weight.dtype):
            raise UnsupportedError(
                f"an adapter in {down.weight.dtype} beside weights in {module.get_base_layer().weight.dtype}"
            )
        return self.cpp.Adapter(self.matrix(down), self.matrix(up), module.scaling[active[0]])

    def norm(self, module: Any, *, plus_one: bool = False) -> Any:
        """A LayerNorm (transformers' and torch's), or else an RMSNorm; `plus_one`: it multiplies by 1 + weight."""
        is_layer = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("LayerNorm")
        kind = self.cpp.NormKind.layer if is_layer else self.cpp.NormKind.rms
        epsilon = getattr(module, "variance_epsilon", None) or module.eps
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        return self.cpp.Norm(
            kind,
            self.fp32(weight, 1.0 if plus_one else 0.0),
            self.fp32(bias),
            epsilon,
            round_before_weight=not is_layer and not plus_one,
        )

    def fp32(self, tensor: Tensor | None, plus: float = 0.0) -> int:
        """The address of a vector in float32, of a copy unless it is float32 already; 0 for None."""
        if tensor is None:
            return 0
        numbers = tensor.detach().float()
        numbers = (numbers + plus if plus else numbers).contiguous()
        self.made.append(numbers)
        return numbers.data_ptr()

    def embedding(self, module: Any, scale: float = 1.0) -> Any:
        weight = self.plain(module.weight, (module.num_embeddings, module.embedding_dim), module)
        return self.cpp.Embedding(weight.data_ptr(), self.dtype(weight), weight.stride(0), scale)

    def rotary(self, module: Any, *layer_type: str, interleaved: bool = False) -> Any:
        """The angles' cosines and sines for all positions, from the model's own module."""
        parameters = self.config.rope_parameters
        parameters = parameters[layer_type[0]] if layer_type else parameters
        kind = parameters["rope_type"]
        if kind == "longrope":
            limit = parameters["original_max_position_embeddings"]
            if self.shortest <= limit < self.longest:
                raise UnsupportedError(f"rope_scaling 'longrope' of rows that pass {limit} tokens: angles change")
        elif kind not in _ROPE_KINDS:
            raise UnsupportedError(f"rope_scaling {kind!r}")
        with torch.no_grad():
            device = self.model.device
            positions = torch.arange(self.longest, device=device)[None]
            tables = module(torch.zeros(1, dtype=self.model.dtype, device=device), positions, *layer_type)
        half = tables[0].shape[-1] // 2
        cos, sin = ((table[0, :, ::2] if interleaved else table[0, :, :half]).float().contiguous() for table in tables)
        self.made += [cos, sin]
        return self.cpp.Rotary(cos.data_ptr(), sin.data_ptr(), 2 * half, interleaved)

    def activation(self, name: str) -> Any:
        if name not in _ACTIVATIONS:
            raise UnsupportedError(f"activation {name!r}")
        return getattr(self.cpp.Activation, _ACTIVATIONS[name])

    def side_by_side(self, query_heads: int, key_value_heads: int, size: int) -> None:
        """All queries, then all keys, then all values."""
        self.lay_out(query_heads, key_value_heads, size, 0, query_heads, query_heads + key_value_heads, 1)

    def lay_out(
        self, query_heads: int, key_value_heads: int, size: int, queries: int, keys: int, values: int, stride: int
    ) -> None:
        """Where the heads lie in the projections' row, counted in heads."""
        heads = self.heads
        heads.query_heads, heads.key_value_heads, heads.size = query_heads, key_value_heads, size
        heads.queries, heads.keys, heads.values = queries * size, keys * size, values * size
        heads.query_stride = heads.key_value_stride = stride * size


# ---- families --------------------------------------------------------------------------------------------------------


def _llama(d: _Describer, out: Any, *, plus_one: bool = False, interleaved: bool = False) -> None:
    """Llama and what differs from it by a part: Qwen2 and Qwen3, Mistral, Granite, Phi-3, Gemma 2 and 3, Cohere."""
    trunk, config = d.model.model, d.config
    scale = float(getattr(trunk.embed_tokens, "embed_scale", torch.ones(())).to(d.model.dtype))
    out.hidden = config.hidden_size
    out.embedding = d.embedding(trunk.embed_tokens, scale * getattr(config, "embedding_multiplier", 1.0))
    out.activation = d.activation(getattr(config, "hidden_activation", None) or config.hidden_act)
    out.residual_scale = getattr(config, "residual_multiplier", 1.0)
    if not config._attn_implementation.endswith("sdpa"):  # which has no cap: transformers before 5.21 leaves it out
        out.attention_cap = getattr(config, "attn_logit_softcapping", None) or 0.0
    out.final_norm = d.norm(trunk.norm, plus_one=plus_one)
    layer_types = getattr(config, "layer_types", None) or [None] * len(trunk.layers)
    by_type = set(config.rope_parameters) >= set(layer_types)  # Gemma 3: local and global layers turn differently
    rotary = {
        kind: d.rotary(trunk.rotary_emb, *([kind] if by_type else []), interleaved=interleaved)
        for kind in set(layer_types)
    }
    for block, kind in zip(trunk.layers, layer_types, strict=True):
        if kind not in (None, "full_attention", "sliding_attention"):
            raise UnsupportedError(f"{kind} layers")
        attention, mlp, layer = block.self_attn, block.mlp, d.cpp.Layer()
        d.side_by_side(config.num_attention_heads, config.num_key_value_heads, attention.head_dim)
        fused = hasattr(attention, "qkv_proj")
        projections = [attention.qkv_proj] if fused else [attention.q_proj, attention.k_proj, attention.v_proj]
        layer.attention_in = [d.linear(projection) for projection in projections]
        layer.attention_out = d.linear(attention.o_proj)
        layer.mlp_in = [d.linear(p) for p in ([mlp.gate_up_proj] if fused else [mlp.gate_proj, mlp.up_proj])]
        layer.mlp_out = d.linear(mlp.down_proj)
        layer.rotary = rotary[kind]
        layer.attention_scale = attention.scaling
        if kind != "full_attention":
            layer.window = getattr(config, "sliding_window", None) or 0
        layer.attention_norm = d.norm(block.input_layernorm, plus_one=plus_one)
        if hasattr(attention, "q_norm"):
            layer.query_norm = d.norm(attention.q_norm, plus_one=plus_one)
            layer.key_norm = d.norm(attention.k_norm, plus_one=plus_one)
        if hasattr(block, "pre_feedforward_layernorm"):  # Gemma: norms before and after each half
            layer.attention_out_norm = d.norm(block.post_attention_layernorm, plus_one=plus_one)
            layer.mlp_norm = d.norm(block.pre_feedforward_layernorm, plus_one=plus_one)
            layer.mlp_out_norm = d.norm(block.post_feedforward_layernorm, plus_one=plus_one)
        else:
            layer.mlp_norm = d.norm(block.input_layernorm if out.parallel else block.post_attention_layernorm)
        d.layers.append(layer)


def _gemma(d: _Describer, out: Any) -> None:
    if getattr(d.config, "use_bidirectional_attention", None):
        raise UnsupportedError("attention to later tokens")
    _llama(d, out, plus_one=True)


def _cohere(d: _Describer, out: Any) -> None:
    if d.config.use_qk_norm:
        raise UnsupportedError("norms of queries and keys with weights of each head's own")
    out.parallel = True
    _llama(d, out, interleaved=True)


def _gpt2(d: _Describer, out: Any) -> None:
    trunk, config = d.model.transformer, d.config
    if config.add_cross_attention:
        raise UnsupportedError("cross-attention")
    out.hidden, out.gated = config.hidden_size, False
    out.embedding, out.positions = d.embedding(trunk.wte), d.embedding(trunk.wpe)
    out.activation = d.activation(config.activation_function)
    out.final_norm = d.norm(trunk.ln_f)
    heads = config.num_attention_heads
    d.side_by_side(heads, heads, config.hidden_size // heads)
    for block in trunk.h:
        layer = d.cpp.Layer()
        layer.attention_in, layer.attention_out = [d.linear(block.attn.c_attn)], d.linear(block.attn.c_proj)
        layer.mlp_in, layer.mlp_out = [d.linear(block.mlp.c_fc)], d.linear(block.mlp.c_proj)
        layer.attention_norm, layer.mlp_norm = d.norm(block.ln_1), d.norm(block.ln_2)
        layer.attention_scale = block.attn.scaling
        d.layers.append(layer)


def _opt(d: _Describer, out: Any) -> None:
    trunk, config = d.model.model.decoder, d.config
    if not config.do_layer_norm_before:
        raise UnsupportedError("norms after each half (do_layer_norm_before=False)")
    out.hidden, out.gated = config.hidden_size, False
    out.embedding, out.positions = d.embedding(trunk.embed_tokens), d.embedding(trunk.embed_positions)
    out.position_offset = trunk.embed_positions.offset
    out.activation = d.activation(config.activation_function)
    if trunk.project_in is not None:
        out.embedding_out, out.hidden_out = [d.linear(trunk.project_in)], [d.linear(trunk.project_out)]
    if trunk.final_layer_norm is not None:
        out.final_norm = d.norm(trunk.final_layer_norm)
    heads = config.num_attention_heads
    d.side_by_side(heads, heads, config.hidden_size // heads)
    for block in trunk.layers:
        attention, layer = block.self_attn, d.cpp.Layer()
        layer.attention_in = [d.linear(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        layer.attention_out = d.linear(attention.out_proj)
        layer.mlp_in, layer.mlp_out = [d.linear(block.fc1)], d.linear(block.fc2)
        layer.attention_norm, layer.mlp_norm = d.norm(block.self_attn_layer_norm), d.norm(block.final_layer_norm)
        if d.half:  # OPT scales queries, which rounds them once more
            layer.query_scale = attention.scaling
        else:
            layer.attention_scale = attention.scaling
        d.layers.append(layer)


def _gpt_neox(d: _Describer, out: Any) -> None:
    trunk, config = d.model.gpt_neox, d.config
    out.hidden, out.gated, out.parallel = config.hidden_size, False, config.use_parallel_residual
    out.branches_first = d.half  # the order decides what is rounded
    out.embedding = d.embedding(trunk.embed_in)
    out.activation = d.activation(config.hidden_act)
    out.final_norm = d.norm(trunk.final_layer_norm)
    heads = config.num_attention_heads
    d.lay_out(heads, heads, config.hidden_size // heads, 0, 1, 2, stride=3)  # each head's query, key and value together
    rotary = d.rotary(trunk.rotary_emb)
    for block in trunk.layers:
        layer = d.cpp.Layer()
        layer.attention_in = [d.linear(block.attention.query_key_value)]
        layer.attention_out = d.linear(block.attention.dense)
        layer.mlp_in, layer.mlp_out = [d.linear(block.mlp.dense_h_to_4h)], d.linear(block.mlp.dense_4h_to_h)
        layer.attention_norm = d.norm(block.input_layernorm)
        layer.mlp_norm = d.norm(block.post_attention_layernorm)
        layer.attention_scale, layer.rotary = block.attention.scaling, rotary
        d.layers.append(layer)


_FAMILIES: dict[str, Callable[[_Describer, Any], None]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _llama,
    "Qwen2ForCausalLM": _llama,
    "Qwen3ForCausalLM": _llama,
    "GraniteForCausalLM": _llama,
    "Phi3ForCausalLM": _llama,
    "CohereForCausalLM": _cohere,
    "Gemma2ForCausalLM": _gemma,
    "Gemma3ForCausalLM": _gemma,
    "GPT2LMHeadModel": _gpt2,
    "OPTForCausalLM": _opt,
    "GPTNeoXForCausalLM": _gpt_neox,
}
