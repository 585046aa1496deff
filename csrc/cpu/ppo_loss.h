// PPO's clipped policy loss over tokens: sums of blocks and the gradients, in one pass over plain pointers.
// Formula: ppo_token.h.
#pragma once

#include <cstdint>

#include "isa.h"

namespace rlhf_fast {

struct PPOTokenOptions;

enum PPOLossSum { kPolicyLoss, kApproxKL, kClipped, kEntropy, kRatioMax, kPPOLossSums };  // of ratios the largest

template <typename T>  // float or double
struct PPOLoss {
  int64_t tokens;
  const T* logprobs;  // [tokens], like all that follow
  const T* old_logprobs;
  const T* advantages;
  const bool* mask;       // false: nothing is taken from the token, and its gradients are 0
  const T* weights;       // or null for ones
  const T* ref_logprobs;  // or null
  const T* entropy;       // or null
  const PPOTokenOptions* options;
  double num_tokens;  // divides the gradients
  T* grad_logprobs;   // or null when not wanted
  T* grad_entropy;    // or null when not wanted
  double* sums;       // [blocks of token_blocks.h][kPPOLossSums]
};

#define RLHF_FAST_DECLARE(isa)                                                   \
  namespace isa {                                                                \
  void ppo_loss(const PPOLoss<float>& args, int64_t begin, int64_t end);         \
  void ppo_loss(const PPOLoss<double>& args, int64_t begin, int64_t end);        \
  } /* begin, end: blocks */
RLHF_FAST_FOR_EACH_ISA(RLHF_FAST_DECLARE)
#undef RLHF_FAST_DECLARE

}  // namespace rlhf_fast
