"""The parts of the memory plan: what a layer keeps, which micro-batch, what is there at one time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf_fast.config import SFTConfig
from rlhf_fast.models import add_adapters
from rlhf_fast.models.modules import decoder_of
from rlhf_fast.scaling import llama
from rlhf_fast.training_memory import (
    EngineMemory,
    MicroBatch,
    Pass,
    engine_memory,
    kept_by_layer,
    micro_batch,
    model_pass,
    training_peak,
)

from .families import tiny_model

CONFIG = SFTConfig(model_name_or_path="-", train_data="-")
TOKENS = 2 * 64


def kept_bytes(model: Any) -> float:
    """Bytes a token that autograd keeps of the trunk's forward, each storage once, parameters not."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.zeros(2, TOKENS // 2, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in kept.values()) / TOKENS


@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_keeps_what_autograd_keeps(dtype: str, targets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # DeepSpeed's ZeRO-3, once used in a process, puts a product there that keeps inputs of frozen weights too.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 2}

    def of(layers: int) -> float:
        model = tiny_model("llama", getattr(torch, dtype), num_hidden_layers=layers, **sizes).train()
        if targets:
            add_adapters(model, replace(CONFIG, use_peft=True, lora_r=1, lora_target_modules=targets))
        return kept_bytes(model)

    mlp = targets in (None, "all-linear")
    numbers = kept_by_layer(256, 640, 128, norms_trained=targets is None, mlp_trained=mlp)
    half = dtype == "bfloat16"
    assert of(3) - of(2) == pytest.approx(numbers * (2 if half else 4) + (4 * 256 if half else 0), rel=0.05)


def test_a_micro_batch_is_whole_rows() -> None:
    assert micro_batch(16, 256, 4096, wanted_in_row=64) == MicroBatch(4096, 1024, several=False)
    assert micro_batch(64, 152, 4096, wanted_in_row=24) == MicroBatch(26 * 152, 26 * 24, several=True)
    assert micro_batch(4, 600, 512, wanted_in_row=0) == MicroBatch(600, 0, several=True)  # one row at least


def test_gradients_come_as_activations_go() -> None:
    engine = EngineMemory(weights=0, optimizer=0, gradients=10, standing=0, bucket=0, sending=0)
    policy, critic = Pass(engine, activations=100, last=3, pooled=0), Pass(engine, activations=50, last=0, pooled=0)
    assert training_peak([policy, critic], several=False) == 100
    assert training_peak([critic, policy], several=False) == 110  # beside the first one's gradients
    assert training_peak([policy, critic], several=True) == 120  # both are there since the first micro-batch
    sends = replace(engine, bucket=70, sending=70)
    assert training_peak([replace(policy, engine=sends)], several=False) == 170


def test_logits_beyond_the_limit_are_never_whole() -> None:
    shape = llama(2, 64, 128, 4, 4, 50_000, tied=True)
    engine = engine_memory(shape, CONFIG, 1)

    def of(wanted: int) -> float:
        return model_pass(shape, CONFIG, engine, MicroBatch(4096, wanted, several=False), on_gpu=False).activations

    assert of(1024) - of(512) == pytest.approx(512 * 4 * (50_000 + 2 * 64))
    assert of(2048) < of(1024)


@pytest.mark.parametrize(("stage", "ranks", "state"), [(0, 1, 12), (1, 2, 4 + 6), (2, 2, 4 + 6), (3, 2, 2 + 6)])
def test_what_stays_between_steps(stage: Any, ranks: int, state: int) -> None:
    """Bytes a weight in fp32: the weight, and Adam's moments; under ZeRO fp32 master weights too."""
    shape = llama(2, 64, 128, 4, 4, 1000)
    engine = engine_memory(shape, replace(CONFIG, zero_stage=stage), ranks)
    assert engine.weights + engine.optimizer == state * shape.parameters
