"""Sampling from the training weights, with the log-probs that training needs.

params.py                SamplingParams, Completion
rollout.py               Rollout: tensors for training
philox.py                counter-based random numbers
sampler.py               logits -> token and its log-probs, a batch at a time
stop_strings.py          where a text ends
streaming.py             a text in pieces while it is made
transformers_backend.py  decoding with transformers' generate
generator.py             Generator: batches, seeds, results
"""

from .generator import Generator, GeneratorStats
from .params import Completion, FinishReason, SamplingParams
from .rollout import Rollout

__all__ = ["Completion", "FinishReason", "Generator", "GeneratorStats", "Rollout", "SamplingParams"]
