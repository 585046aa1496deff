// The product of a linear layer, y = x . W^T + bias, for few rows (decoding) and many (prompts).
//
// The bits of a row of y depend on that row of x, the weights and the instruction set alone: not on how many rows come
// with it, nor on its place among them, nor on the number of threads. Sums are taken in float, in the same order
// whatever the number of rows (linear.cpp and linear_bfloat16.cpp say which).
#pragma once

#include <omp.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "../cpu/choose_isa.h"

namespace rlhf_fast {

enum class WeightType { float32, bfloat16, float16 };

struct Adapter;  // in adapter.h

// A layer's weights where they lie. Sizes are 1 or more.
struct Linear {
  const void* weight;  // [out, in], or [in, out] when transposed, as GPT-2's Conv1D keeps it
  WeightType type;
  int64_t out, in;
  int64_t row_stride;  // from one row of `weight` to the next, in elements
  bool transposed;
  const void* bias;  // [out], of the weights' type, or null
  std::shared_ptr<const Adapter> adapter = nullptr;  // add_adapters adds what it gives; linear leaves it out

  // The layer of the outputs [begin, end). Their bits are the same when begin is a multiple of 16.
  Linear outputs(int64_t begin, int64_t end) const {
    const int64_t element = type == WeightType::float32 ? 4 : 2;
    Linear some = *this;
    some.weight = static_cast<const char*>(weight) + begin * (transposed ? 1 : row_stride) * element;
    some.bias = bias ? static_cast<const char*>(bias) + begin * element : nullptr;
    some.out = end - begin;
    return some;
  }
};

#define RLHF_FAST_DECLARE(isa)                                                                                   \
  namespace isa {                                                                                                \
  void linear(const Linear* layers, int64_t count, const float* x, int64_t rows, int64_t x_stride, float* y,     \
              int64_t y_stride, uint32_t* pairs);                                                                \
  }
RLHF_FAST_FOR_EACH_ISA(RLHF_FAST_DECLARE)
#undef RLHF_FAST_DECLARE

// Pairs of bfloat16 in a row of x, with zeros up to a multiple of 16.
constexpr int64_t paired_row(int64_t in) { return (in + 31) / 32 * 16; }

// Rows of x whose pairs are made together. Where there are no more, each thread makes its own: that takes less time
// than to wait for another thread's, and to read them.
constexpr int64_t kRowsOfGroup = 12;

namespace {

// y[i * y_stride + n], i < rows and n < out, from x[i * x_stride + k], k < in, for layers of the same x, such as queries,
// keys and values: their outputs lie side by side in a row of y. y must not overlap x. Where weights are bfloat16, x must
// be numbers that a bfloat16 can be. `scratch` grows as needed. OpenMP's threads share the work, and start once for all
// layers: call it outside of a parallel region.
inline void linear(const Linear* layers, int64_t count, const float* x, int64_t rows, int64_t x_stride, float* y,
                   int64_t y_stride, std::vector<uint32_t>& scratch) {
  uint32_t* pairs = nullptr;
  if (layers[0].type == WeightType::bfloat16 && multiplies_bfloat16()) {
    const size_t size = (rows > kRowsOfGroup ? 1 : omp_get_max_threads()) * rows * paired_row(layers[0].in);
    if (scratch.size() < size) scratch.resize(size);
    pairs = scratch.data();
  }
  RLHF_FAST_KERNEL(isa(), linear)(layers, count, x, rows, x_stride, y, y_stride, pairs);
}

inline void linear(const Linear& layer, const float* x, int64_t rows, int64_t x_stride, float* y, int64_t y_stride,
                   std::vector<uint32_t>& scratch) {
  linear(&layer, 1, x, rows, x_stride, y, y_stride, scratch);
}

}  // namespace
}  // namespace rlhf_fast
