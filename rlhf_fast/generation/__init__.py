"""Sampling from the training weights, with the log-probs that training needs.

params.py                SamplingParams, Completion
rollout.py               Rollout: tensors for training
philox.py                counter-based random numbers
sampler.py               logits -> token and its log-probs, a batch at a time
stop_strings.py          where a text ends
streaming.py             a text in pieces while it is made
decoded.py               what goes into a backend and comes out of it
model_spec.py            a transformers model as the own decoder needs to know it
loop.py                  the own decoder, csrc/generation, on either device
cpp_backend.py           on the CPU
cuda_backend.py          on a GPU
cuda_graphs.py           a GPU's step as one launch
transformers_backend.py  decoding with transformers' generate
abort.py                 the flag that ends a call
generator.py             Generator: choice of backend, seeds, results
"""

from .generator import Generator, GeneratorStats
from .params import Completion, FinishReason, SamplingParams
from .rollout import Rollout

__all__ = ["Completion", "FinishReason", "Generator", "GeneratorStats", "Rollout", "SamplingParams"]
