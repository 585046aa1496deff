// The policy loss of one token and its derivatives: what ppo_loss and logits_ppo_loss share. The formula and its source:
// rlhf_fast/ops/ppo_loss.py. Where max, min and clamp have no derivative it is the one that PyTorch's autograd takes: at a
// tie each side gets half, and the ends of a clamp count as inside. A log-prob of NaN has a derivative of NaN.
#pragma once

#include "lanes.h"

namespace rlhf_fast {

struct PPOTokenOptions {
  double clip_low, clip_high;  // of the ratio
  double dual_clip;            // 0: none
  double kl_coef;
  int kl_estimator;  // 2 or 3
  double entropy_coef;
};

namespace RLHF_FAST_ISA {

template <typename N>  // double, or Floats: a vector of tokens
struct PPOToken {      // not yet divided by the number of tokens
  N loss, dlogprob, dentropy;
  N ratio;
  N clipped;  // 1 or 0
  N approx_kl;
};

constexpr double kMaxLogRatio = 20;

template <typename N>
inline PPOToken<N> ppo_token(N logprob, N old_logprob, N advantage, N weight, bool has_ref, N ref_logprob, N entropy,
                             const PPOTokenOptions& options) {
  const N zero = all<N>(0), half = all<N>(0.5), one = all<N>(1);
  const N lowest = all<N>(-kMaxLogRatio), highest = all<N>(kMaxLogRatio);
  const N clip_low = all<N>(options.clip_low), clip_high = all<N>(options.clip_high);
  const N difference = logprob - old_logprob;
  const N log_ratio = clamp(difference, lowest, highest), ratio = exponential(log_ratio);
  const N unclipped = zero - advantage * ratio, clipped = zero - advantage * clamp(ratio, clip_low, clip_high);

  const N from_clipped = outside(ratio, clip_low, clip_high, zero, unclipped);
  N loss = greater(clipped, unclipped, clipped, unclipped);
  N dlogprob = greater(clipped, unclipped, from_clipped,
                       greater(unclipped, clipped, unclipped, half * (unclipped + from_clipped)));
  if (options.dual_clip != 0) {
    const N bound = zero - all<N>(options.dual_clip) * advantage;
    const N bounded = greater(loss, bound, bound, loss);
    const N dbounded = greater(loss, bound, zero, greater(bound, loss, dlogprob, half * dlogprob));
    loss = greater(zero, advantage, bounded, loss);
    dlogprob = greater(zero, advantage, dbounded, dlogprob);
  }
  dlogprob = outside(difference, lowest, highest, zero, dlogprob);

  if (has_ref && options.kl_coef != 0) {
    const N d = logprob - ref_logprob, kl_coef = all<N>(options.kl_coef);
    if (options.kl_estimator == 2) {
      loss = loss + kl_coef * half * d * d;
      dlogprob = dlogprob + kl_coef * d;
    } else {
      const N x = clamp(zero - d, lowest, highest), k3 = exponential_beyond_linear(x);
      loss = loss + kl_coef * k3;
      dlogprob = dlogprob - kl_coef * outside(zero - d, lowest, highest, zero, k3 + x);
    }
  }
  const N entropy_coef = all<N>(options.entropy_coef);
  loss = loss - entropy_coef * entropy;
  return {weight * loss, weight * dlogprob, zero - weight * entropy_coef, ratio,
          greater(clipped, unclipped, one, zero), half * log_ratio * log_ratio};
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
