// Rows of logits in memory: of what type, and where each starts.
#pragma once

#include <cstdint>

namespace rlhf_fast {

enum class LogitsType { float32, float64, bfloat16, float16 };

// Where a row of logits starts, in elements: two levels of strides, so that logits[:, :-1] needs no copy.
struct RowLayout {
  int64_t inner;  // rows of the inner level
  int64_t outer_stride;
  int64_t inner_stride;

  int64_t start(int64_t row) const { return row / inner * outer_stride + row % inner * inner_stride; }
};

}  // namespace rlhf_fast
