// The loss of one token a row and its gradient over the row's logits, in one read and one write: PPO's loss, and
// cross-entropy. A row is read once from memory; the second pass, which writes the gradient in place, finds it in the
// second-level cache. Formulas: gather_logprobs.h for the softmax, ppo_token.h for PPO.
#pragma once

#include <cstdint>

#include "isa.h"
#include "ppo_token.h"
#include "rows.h"

namespace rlhf_fast {

struct LogitsLoss {
  LogitsType type;
  void* logits;  // become the gradient of (sum of the rows' losses) / tokens
  RowLayout layout;
  int64_t vocabulary;
  const int64_t* ids;  // [rows], from 0 to vocabulary - 1 where the mask is true
  const bool* mask;    // [rows]; false: the row is not read, its gradient and all that is found of it are 0
  const double* weights;  // [rows], or null for ones
  double temperature;
  double tokens;
  double* found;    // [columns of the loss below][rows]
  int64_t columns;  // from one column of `found` to the next
};

struct LogitsPPOLoss : LogitsLoss {
  // found: logprob, loss, approx_kl, whether clipped, entropy, ratio
  const double* old_logprobs;  // [rows]
  const double* advantages;    // [rows]
  const double* ref_logprobs;  // [rows], or null
  PPOTokenOptions options;
};

struct LogitsCrossEntropy : LogitsLoss {
  // found: logprob, loss = -weight * logprob, whether no logit is larger than the id's
};

#define RLHF_FAST_DECLARE(isa)                                                                \
  namespace isa {                                                                             \
  void logits_ppo_loss(const LogitsPPOLoss& args, int64_t begin, int64_t end);                \
  void logits_cross_entropy(const LogitsCrossEntropy& args, int64_t begin, int64_t end);      \
  }
RLHF_FAST_FOR_EACH_ISA(RLHF_FAST_DECLARE)
#undef RLHF_FAST_DECLARE

}  // namespace rlhf_fast
