// The policy loss of one token and its derivatives: what ppo_loss and logits_ppo_loss share. The formula and its source:
// rlhf_fast/ops/ppo_loss.py. Where max, min and clamp have no derivative it is the one that PyTorch's autograd takes: at a
// tie each side gets half, and the ends of a clamp count as inside. A log-prob of NaN has a derivative of NaN.
#pragma once

#include <math.h>

#include "isa.h"

namespace rlhf_fast {

struct PPOTokenOptions {
  double clip_low, clip_high;  // of the ratio
  double dual_clip;            // 0: none
  double kl_coef;
  int kl_estimator;  // 2 or 3
  double entropy_coef;
};

struct PPOToken {  // not yet divided by the number of tokens
  double loss, dlogprob, dentropy;
  double ratio;
  bool clipped;
  double approx_kl;
};

namespace RLHF_FAST_ISA {

constexpr double kMaxLogRatio = 20;

inline PPOToken ppo_token(double logprob, double old_logprob, double advantage, double weight, bool has_ref,
                          double ref_logprob, double entropy, const PPOTokenOptions& options) {
  const auto clamp = [](double x, double low, double high) { return x < low ? low : x > high ? high : x; };
  const auto outside = [](double x, double low, double high) { return x < low || x > high; };  // NaN is not
  const double difference = logprob - old_logprob;
  const double log_ratio = clamp(difference, -kMaxLogRatio, kMaxLogRatio), ratio = exp(log_ratio);
  const double unclipped = -advantage * ratio;
  const double clipped = -advantage * clamp(ratio, options.clip_low, options.clip_high);

  const double from_clipped = outside(ratio, options.clip_low, options.clip_high) ? 0 : unclipped;
  double loss = unclipped, dlogprob = unclipped;
  if (clipped > unclipped) {
    loss = clipped, dlogprob = from_clipped;
  } else if (clipped == unclipped) {
    dlogprob = 0.5 * (unclipped + from_clipped);
  }
  if (options.dual_clip != 0 && advantage < 0) {
    const double bound = -options.dual_clip * advantage;
    if (loss > bound) loss = bound, dlogprob = 0;
    else if (loss == bound) dlogprob *= 0.5;
  }
  if (outside(difference, -kMaxLogRatio, kMaxLogRatio)) dlogprob = 0;

  if (has_ref && options.kl_coef != 0) {
    const double d = logprob - ref_logprob;
    if (options.kl_estimator == 2) {
      loss += options.kl_coef * 0.5 * d * d;
      dlogprob += options.kl_coef * d;
    } else {
      const double x = clamp(-d, -kMaxLogRatio, kMaxLogRatio);
      loss += options.kl_coef * (expm1(x) - x);
      if (!outside(-d, -kMaxLogRatio, kMaxLogRatio)) dlogprob -= options.kl_coef * expm1(x);
    }
  }
  loss -= options.entropy_coef * entropy;
  return {weight * loss, weight * dlogprob, -weight * options.entropy_coef, ratio, clipped > unclipped,
          0.5 * log_ratio * log_ratio};
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
