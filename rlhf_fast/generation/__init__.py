"""Sampling from the training weights, with the log-probs that training needs.

params.py                SamplingParams, Completion
rollout.py               Rollout: tensors for training
philox.py                counter-based random numbers
sampler.py               logits -> token and its log-probs, a batch at a time
stop_strings.py          where a text ends
streaming.py             a text in pieces while it is made
decoded.py               what goes into a backend and comes out of it
cpp_backend.py           decoding in C++, csrc/generation
model_spec.py            a transformers model as the C++ decoder needs to know it
transformers_backend.py  decoding with transformers' generate
abort.py                 the flag that ends a call
generator.py             Generator: choice of backend, seeds, results
"""

from .generator import Generator, GeneratorStats
from .params import Completion, FinishReason, SamplingParams
from .rollout import Rollout

__all__ = ["Completion", "FinishReason", "Generator", "GeneratorStats", "Rollout", "SamplingParams"]
