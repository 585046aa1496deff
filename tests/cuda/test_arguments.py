"""Launchers refuse what their kernels have no room for, before they launch."""

from __future__ import annotations

import pytest

from tests.cuda_on_cpu.device import Device, KernelError, Kernels

# Python cannot catch what C++ throws.
SOURCE = """
#include <stdexcept>
#include "kernels.h"
using namespace rlhf_fast::cuda;

template <typename Call>
int64_t is_refused(Call call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return 1;
  }
  return 0;
}

constexpr Linear kLayer{nullptr, Type::float32, 1, 1, 1, false, nullptr};
const Linear layers[8] = {kLayer, kLayer, kLayer, kLayer, kLayer, kLayer, kLayer, kLayer};

extern "C" int64_t linear_rows(int64_t rows) {
  return is_refused([&] { linear(layers[0], nullptr, rows, 1, Type::float32, nullptr, 1, nullptr, nullptr); });
}
extern "C" int64_t linear_layers(int64_t count) {
  return is_refused(
      [&] { linear_many(layers, int(count), nullptr, 1, 1, Type::float32, nullptr, 1, nullptr, nullptr); });
}
extern "C" int64_t gated_mlp_rows(int64_t rows) {
  return is_refused(
      [&] { gated_mlp_in(layers[0], layers[1], Activation::silu, nullptr, rows, 1, nullptr, 1, nullptr); });
}
extern "C" int64_t attention_bytes(int64_t bytes) {
  const PagedCache cache{Type::float32, nullptr, 1, 1, bytes / 4};
  const Heads heads{.query_heads = 1, .key_value_heads = 1, .size = bytes / 4};
  const Tokens tokens{nullptr, nullptr, nullptr, 1, 1};
  return is_refused(
      [&] { attention(cache, 0, heads, 1, 0, 0, tokens, nullptr, 0, nullptr, nullptr, 1, nullptr); });
}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    source = tmp_path_factory.mktemp("source") / "arguments.cu"
    source.write_text(SOURCE)
    return Device().load("linear.cu", "gated_mlp.cu", "attention.cu", source)


@pytest.mark.parametrize(
    ("function", "most"),
    [("linear_rows", 16), ("linear_layers", 4), ("gated_mlp_rows", 16), ("attention_bytes", 2048)],
)
def test_what_is_too_much(kernels: Kernels, function: str, most: int) -> None:
    call = getattr(kernels, function)
    assert call(most + 4) == 1
    with pytest.raises(KernelError):  # it went on to the launch, with no memory to work on
        call(most)


@pytest.mark.parametrize("function", ["linear_rows", "gated_mlp_rows"])
def test_no_rows(kernels: Kernels, function: str) -> None:
    assert getattr(kernels, function)(0) == 1
