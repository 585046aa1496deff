"""Where an offloaded model's weights lie, before, while and after it is asked.

A second copy in the host's memory stands for the device's: the class copies, switches and drops the same for any
device. tests/gpu/test_offload.py has a real one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_fast.models import OffloadedWeights, load_causal_lm

CPU = torch.device("cpu")


def places(module: torch.nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in module.parameters()}


@torch.no_grad()
def test_weights_are_on_the_device_only_while_they_are_asked(tiny_llama: Path) -> None:
    model = load_causal_lm(tiny_llama, dtype="float32")
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    weights = OffloadedWeights(model, CPU)
    host = places(model)
    for _ in range(2):
        with weights.loaded():
            assert not places(model) & host
            assert torch.equal(model(ids).logits, expected)
            on_device = [StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()]
            model.model.norm.weight.zero_()  # lost: it was the copy
            assert not any(ref.expired() for ref in on_device)
        assert places(model) == host
        assert all(ref.expired() for ref in on_device)  # the device's memory is free again
    assert torch.equal(model(ids).logits, expected)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_tied_weights_stay_tied() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    weights = OffloadedWeights(model, CPU)
    with weights.loaded():
        assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()


def test_a_failure_inside_brings_them_back(tiny_llama: Path) -> None:
    model = load_causal_lm(tiny_llama, dtype="float32")
    weights = OffloadedWeights(model, CPU)
    host = places(model)
    with pytest.raises(RuntimeError, match="no memory"), weights.loaded():
        raise RuntimeError("no memory")
    assert places(model) == host
