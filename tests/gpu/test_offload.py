"""Offloaded weights between the host's pinned memory and the GPU."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_fast.models import OffloadedWeights, load_causal_lm


@torch.no_grad()
def test_weights_are_on_the_gpu_only_while_they_are_asked(tiny_llama: Path) -> None:
    ids = torch.tensor([[5, 6, 7]], device="cuda")
    expected = load_causal_lm(tiny_llama, dtype="float32").to("cuda")(ids).logits
    model = load_causal_lm(tiny_llama, dtype="float32")
    weights = OffloadedWeights(model, torch.device("cuda"))
    assert all(parameter.is_pinned() for parameter in model.parameters())
    assert all(buffer.is_cuda for buffer in model.buffers())
    before = torch.cuda.memory_allocated()
    with weights.loaded():
        assert all(parameter.is_cuda for parameter in model.parameters())
        assert torch.cuda.memory_allocated() > before
        assert torch.equal(model(ids).logits, expected)
    assert all(parameter.is_pinned() for parameter in model.parameters())
    assert torch.cuda.memory_allocated() == before
