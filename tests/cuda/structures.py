"""The structures and numbers of csrc/cuda/kernels.h for ctypes. Pointers are tensors' data_ptr(), or None."""

from __future__ import annotations

from ctypes import Structure, c_bool, c_double, c_float, c_int, c_int64, c_void_p
from enum import IntEnum

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PAGE_TOKENS = 16


class Activation(IntEnum):
    RELU = 0
    SILU = 1
    GELU = 2
    GELU_TANH = 3
    GELU_NEW = 4


class NormKind(IntEnum):
    NONE = 0
    RMS = 1
    LAYER = 2


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class PagedCache(Structure):
    _fields_ = [
        ("type", c_int),
        ("pool", c_void_p),
        ("layers", c_int64),
        ("heads", c_int64),
        ("head_size", c_int64),
    ]


class Tokens(Structure):
    _fields_ = [
        ("sequence", c_void_p),
        ("position", c_void_p),
        ("pages", c_void_p),
        ("max_pages", c_int64),
        ("count", c_int64),
    ]


class Norm(Structure):
    _fields_ = [
        ("kind", c_int),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("epsilon", c_float),
        ("round_before_weight", c_bool),
    ]


class Rotary(Structure):
    _fields_ = [("cos", c_void_p), ("sin", c_void_p), ("size", c_int64), ("interleaved", c_bool)]


class Heads(Structure):
    _fields_ = [
        (name, c_int64)
        for name in (
            *("query_heads", "key_value_heads", "size"),
            *("queries", "keys", "values"),
            *("query_stride", "key_value_stride"),
        )
    ]


class Linear(Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("type", c_int),
        ("out", c_int64),
        ("in_", c_int64),
        ("row_stride", c_int64),
        ("transposed", c_bool),
        ("bias", c_void_p),
    ]


class SamplingOptions(Structure):
    _fields_ = [
        ("temperature", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("repetition_penalty", c_double),
        ("top_k", c_int64),
        ("min_tokens", c_int64),
        ("stop_ids", c_void_p),
        ("stop_count", c_int64),
    ]


class Sampling(Structure):
    _fields_ = [
        ("seed", c_void_p),
        ("sample", c_void_p),
        ("position", c_void_p),
        ("seen", c_void_p),
        ("token", c_void_p),
        ("logprob", c_void_p),
        ("sampled_logprob", c_void_p),
    ]
