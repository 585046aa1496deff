// The sampler's passes over a row of logits, in blocks: what a block's largest logit and its sum of exponentials are.
#pragma once

#include <cstdint>

#include "../cpu/isa.h"

namespace rlhf_fast {

// Logits whose exponentials are summed in float: few enough that the sum is as exact as its terms.
constexpr int64_t kExponentialsBlock = 256;

#define RLHF_FAST_DECLARE(isa)                                                                                       \
  namespace isa {                                                                                                    \
  /* maxima[b] = the largest logit of block b; undefined where one is NaN */                                         \
  void block_maxima(const float* x, int64_t n, float* maxima);                                                       \
  /* sums[b] = sum of e^((x - largest) / temperature) over block b; NaN where a logit is NaN. largest >= all x */    \
  void block_sums(const float* x, int64_t n, float largest, double temperature, float* sums);                        \
  /* out[j] = e^((x[j] - largest) / temperature), the terms of those sums; out may be x */                           \
  void exponentials(const float* x, int64_t n, float largest, double temperature, float* out);                       \
  /* places = those j in order for which x[j] >= floor; returns how many */                                          \
  int64_t select(const float* x, int64_t n, float floor, int32_t* places);                                           \
  }
RLHF_FAST_FOR_EACH_ISA(RLHF_FAST_DECLARE)
#undef RLHF_FAST_DECLARE

}  // namespace rlhf_fast
