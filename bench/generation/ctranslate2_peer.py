"""CTranslate2 as a decoder: a request in each line of input, the tokens of its rows as a line of output, in JSON.

A script for the environment of `make bench-peers`, which has ctranslate2 and not torch; decoders.py starts it with a
Llama's weights by transformers' names (.npz, float32). Tokens are ids as text. All rows have one length.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import ctranslate2
import numpy
from ctranslate2.specs import common_spec, transformer_spec


def save_model(weights: Any, folder: Path, heads: int, key_value_heads: int, epsilon: float, theta: float) -> None:
    """The weights in CTranslate2's form, as its converter of transformers' Llama lays them out."""
    layers = sum(name.endswith("input_layernorm.weight") for name in weights)
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        layers,
        heads,
        activation=common_spec.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
        rotary_base=theta,
        num_heads_kv=None if key_value_heads == heads else key_value_heads,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = weights["model.embed_tokens.weight"]
    decoder.projection.weight = weights["model.embed_tokens.weight"]  # a tied head
    decoder.layer_norm.gamma = weights["model.norm.weight"]
    for i, layer in enumerate(decoder.layer):

        def of(name: str, i: int = i) -> Any:
            return weights[f"model.layers.{i}.{name}.weight"]

        attention, mlp = layer.self_attention, layer.ffn
        attention.layer_norm.gamma, mlp.layer_norm.gamma = of("input_layernorm"), of("post_attention_layernorm")
        attention.linear[0].weight = numpy.concatenate([of(f"self_attn.{x}_proj") for x in "qkv"])
        attention.linear[1].weight = of("self_attn.o_proj")
        mlp.linear_0.weight, mlp.linear_0_noact.weight = of("mlp.gate_proj"), of("mlp.up_proj")
        mlp.linear_1.weight = of("mlp.down_proj")
    spec.register_vocabulary([str(i) for i in range(len(decoder.embeddings.weight))])
    spec.config.layer_norm_epsilon = epsilon
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.validate()
    spec.optimize()
    spec.save(str(folder))


def generate(generator: Any, prompts: list[list[int]], lengths: list[int], greedy: bool) -> list[list[int]]:
    assert len(set(lengths)) == 1
    results = generator.generate_batch(
        [[str(token) for token in prompt] for prompt in prompts],
        max_length=lengths[0],
        min_length=lengths[0],
        sampling_topk=1 if greedy else 0,  # 0: all of them
        include_prompt_in_result=False,
    )
    return [result.sequences_ids[0] for result in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    for name, kind in (("heads", int), ("key_value_heads", int), ("epsilon", float), ("theta", float)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    arguments = vars(parser.parse_args())
    threads, file = arguments.pop("threads"), arguments.pop("file")
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        with numpy.load(file) as weights:
            save_model(dict(weights), Path(folder), **arguments)
        generator = ctranslate2.Generator(folder, compute_type="float32", inter_threads=1, intra_threads=threads)
    for line in sys.stdin:
        question = json.loads(line)
        assert question.pop("n") == 1
        print(json.dumps(generate(generator, **question)), flush=True)


if __name__ == "__main__":
    main()
