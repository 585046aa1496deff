// The clipped value loss over tokens: sums of blocks and the gradient, in one pass over plain pointers.
// Formula: rlhf_fast/ops/value_loss.py.
#pragma once

#include <cstdint>

#include "isa.h"

namespace rlhf_fast {

enum ValueLossSum { kValueLoss, kValueClipped, kValueLossSums };

template <typename T>  // float or double
struct ValueLoss {
  int64_t tokens;
  const T* values;  // [tokens], like all that follow
  const T* old_values;
  const T* returns;
  const bool* mask;        // false: nothing is taken from the token, and its gradient is 0
  double cliprange_value;  // infinity: not clipped
  double num_tokens;       // divides the gradient
  T* grad_values;          // or null when not wanted
  double* sums;            // [blocks of token_blocks.h][kValueLossSums]
};

#define RLHF_FAST_DECLARE(isa)                                                       \
  namespace isa {                                                                    \
  void value_loss(const ValueLoss<float>& args, int64_t begin, int64_t end);         \
  void value_loss(const ValueLoss<double>& args, int64_t begin, int64_t end);        \
  } /* begin, end: blocks */
RLHF_FAST_FOR_EACH_ISA(RLHF_FAST_DECLARE)
#undef RLHF_FAST_DECLARE

}  // namespace rlhf_fast
