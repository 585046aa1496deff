// What every op's tensor side shares: the CPU's instruction set, memory, rows of logits, calls through the dispatcher.
//
// The headers in this folder are parts of one translation unit, ../ops.cpp: PyTorch's headers are what makes it slow to
// compile, so they are read once. Include few of them, and never torch/extension.h.
#pragma once

#define AT_PER_OPERATOR_HEADERS
#include <ATen/Parallel.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "../cpu/choose_isa.h"
#include "../cpu/rows.h"

namespace rlhf_fast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- the machine ----------------------------------------------------------------------------------------------------

// Fresh memory is cleared by the operating system page by page at the first touch, which for a gradient of the logits'
// size costs more than computing it. Large pages make that several times cheaper.
Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor out = at::empty(sizes, options);
#if defined(__linux__)
  if (out.nbytes() >= size_t(4) << 20) {
    const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
    const auto start = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
    const auto begin = (start + page - 1) / page * page, end = (start + out.nbytes()) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: where it fails all goes on
  }
#endif
  return out;
}

// Where the rows are; none when they are not contiguous in themselves or lie in more than two levels of strides.
std::optional<RowLayout> row_layout(const Tensor& logits) {
  const int64_t last = logits.dim() - 1;
  if (logits.size(last) > 1 && logits.stride(last) != 1) return std::nullopt;
  int levels = 0;
  int64_t sizes[2] = {1, 1}, strides[2] = {0, 0};  // from the inside out
  for (int64_t d = last - 1; d >= 0; --d) {
    if (logits.size(d) == 1) continue;
    if (levels > 0 && logits.stride(d) == strides[levels - 1] * sizes[levels - 1]) {
      sizes[levels - 1] *= logits.size(d);
    } else if (levels < 2) {
      sizes[levels] = logits.size(d);
      strides[levels++] = logits.stride(d);
    } else {
      return std::nullopt;
    }
  }
  return RowLayout{std::max<int64_t>(sizes[0], 1), strides[1], strides[0]};
}

// Whether each row can be overwritten: rows of an expanded tensor share their memory.
bool rows_are_disjoint(const Tensor& logits) {
  const auto layout = row_layout(logits);
  if (!layout || logits.numel() == 0) return false;
  const int64_t vocabulary = logits.size(-1), inner = layout->inner, outer = logits.numel() / vocabulary / inner;
  const int64_t a = inner > 1 ? layout->inner_stride : vocabulary, b = outer > 1 ? layout->outer_stride : inner * a;
  return (a >= vocabulary && b >= (inner - 1) * a + vocabulary) ||
         (b >= vocabulary && a >= (outer - 1) * b + vocabulary);
}

LogitsType logits_type(const Tensor& logits) {
  const auto type = logits.scalar_type();
  return type == at::kFloat    ? LogitsType::float32
         : type == at::kDouble ? LogitsType::float64
         : type == at::kHalf   ? LogitsType::float16
                               : LogitsType::bfloat16;
}

at::TensorOptions real_options(const Tensor& logits) {
  return logits.options().dtype(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// Rows that are worth a thread of their own.
int64_t grain(int64_t vocabulary) { return std::max<int64_t>(1, 16384 / vocabulary); }

// Calls the operator of that name through PyTorch's dispatcher, so that whatever traces or wraps tensors sees it.
template <typename F, typename... Args>
auto call(const char* name, F* /*signature*/, Args&&... args) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>().call(std::forward<Args>(args)...);
}

}  // namespace
}  // namespace rlhf_fast
