// Log-softmax at given ids, the entropy, and their gradient: one row of logits at a time, on plain pointers.
//
// With x = logits / temperature, m = max x and s = sum exp(x - m): logprob = x[id] - m - log s and
// entropy = log s - sum(exp(x - m) * (x - m)) / s. The gradient of g * logprob + h * entropy with respect to logit j is
// (g * (j == id) - p_j * (g + h * (log p_j + entropy))) / temperature, with p and log p recomputed from m and log s.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace rlhf_fast {

// "real" below is double for float64 logits and float for all others.
struct GatherLogprobs {
  LogitsType type;
  const void* logits;
  RowLayout layout;
  int64_t vocabulary;
  const int64_t* ids;    // [rows], from 0 to vocabulary - 1, or ignore_index: that row is not read
  int64_t ignore_index;  // such rows give 0, and a gradient of 0
  double temperature;
};

struct GatherLogprobsForward : GatherLogprobs {
  void* logprobs;  // real [rows]
  void* entropy;   // real [rows], or null
  void* stats;     // real [rows][2]: the largest logit m * temperature, and log s
};

struct GatherLogprobsBackward : GatherLogprobs {
  const void* stats;          // as written by the forward pass
  const void* entropy;        // real [rows], or null when grad_entropy is
  const void* grad_logprobs;  // real [rows], or null for zeros
  const void* grad_entropy;   // real [rows], or null for zeros
  void* grad_logits;          // in the logits' type; may be the logits themselves
  RowLayout grad_layout;
};

#define RLHF_FAST_DECLARE(isa)                                                                    \
  namespace isa {                                                                                 \
  void gather_logprobs_forward(const GatherLogprobsForward& args, int64_t begin, int64_t end);    \
  void gather_logprobs_backward(const GatherLogprobsBackward& args, int64_t begin, int64_t end);  \
  }
RLHF_FAST_FOR_EACH_ISA(RLHF_FAST_DECLARE)
#undef RLHF_FAST_DECLARE

}  // namespace rlhf_fast
