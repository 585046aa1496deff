// The product of a linear layer of bfloat16 weights where the CPU multiplies pairs of bfloat16 (vdpbf16ps, which comes
// beside AVX-512): one instruction takes twice the products that one on floats takes.
//
// Products are exact and sums are float, in the order of oneDNN's product, which is PyTorch's on such a CPU: training
// has the same bits. As with every linear() they do not depend on other rows.
#pragma once

#include <cstdint>

#include "linear.h"

#if defined(RLHF_FAST_AVX512)
namespace rlhf_fast::RLHF_FAST_ISA {

// Rows in groups of equal size, as far as possible, that the product takes together.
struct Groups {
  int64_t rows, count;
  explicit Groups(int64_t rows);
  int64_t first(int64_t group) const { return rows * group / count; }
};

// A group's rows as pairs (x[2 i], x[2 i + 1]) of bfloat16: pairs [paired_row(size)][rows].
void to_pairs(const float* x, int64_t rows, int64_t x_stride, int64_t size, uint32_t* pairs);

// Outputs [begin, end) of all rows, y[i * y_stride + n]. x: the groups' pairs, one group after the other.
void paired_outputs(const Linear& layer, const uint32_t* x, int64_t rows, float* y, int64_t y_stride, int64_t begin,
                    int64_t end);

}  // namespace rlhf_fast::RLHF_FAST_ISA
#endif
