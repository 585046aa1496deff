// Rewards from KL and scores, written and scanned (scan.h) in the same pass.
//
// reward_t = -kl_coef * kl_t, and the clipped score on top of it on the row's last masked token.
#pragma once

#include "scan.h"

namespace rlhf_fast {

struct ShapedGae : Scan {
  const void* scores;  // real [rows]
  RowsOf logprobs;
  RowsOf ref_logprobs;  // null data: no KL
  double kl_coef;
  int kl_estimator;   // 1, 2 or 3, as in rlhf_fast.ops.shaped_gae
  double clip_score;  // infinity: not at all
  void* rewards;
};

#define RLHF_FAST_DECLARE(isa)                                         \
  namespace isa {                                                      \
  void shaped_gae(const ShapedGae& args, int64_t begin, int64_t end);  \
  }
RLHF_FAST_FOR_EACH_ISA(RLHF_FAST_DECLARE)
#undef RLHF_FAST_DECLARE

}  // namespace rlhf_fast
