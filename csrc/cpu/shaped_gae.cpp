#include "shaped_gae.h"

#include <math.h>

namespace rlhf_fast::RLHF_FAST_ISA {
namespace {

constexpr double kMaxLogRatio = 20;

inline double k3(double d) {
  const double x = d > kMaxLogRatio ? -kMaxLogRatio : d < -kMaxLogRatio ? kMaxLogRatio : -d;  // NaN stays NaN
  return ::expm1(x) - x;
}

// Rewards without the score: out[t] = weight * kl(logprobs[t] - ref[t]), 0 outside the mask.
template <typename R>
void kl_rewards(const ShapedGae& args, int64_t row, int64_t first, int64_t count, R* out) {
  if (!args.ref_logprobs.data) {
    memset(out, 0, count * sizeof(R));
    return;
  }
  const R* const logprobs = row_of<R>(args.logprobs, row) + first;
  const R* const ref = row_of<R>(args.ref_logprobs, row) + first;
  const uint8_t* const mask = row_of<uint8_t>(args.mask, row) + first;
  const R weight = R(-args.kl_coef), half_weight = R(-0.5 * args.kl_coef);
  switch (args.kl_estimator) {
    case 1: return fill_masked(mask, out, count, [=](int64_t t) { return weight * (logprobs[t] - ref[t]); });
    case 2: return fill_masked(mask, out, count, [=](int64_t t) {
      const R d = logprobs[t] - ref[t];
      return half_weight * (d * d);
    });
    default: return fill_masked(mask, out, count, [=, &args](int64_t t) {
      return mask[t] ? R(-args.kl_coef * k3(double(logprobs[t]) - ref[t])) : R(0);
    });
  }
}

// -1 without any.
int64_t last_masked(const uint8_t* mask, int64_t columns) {
  int64_t last = columns - 1;
  while (last >= 0 && !mask[last]) --last;
  return last;
}

template <typename R>
void run(const ShapedGae& args, int64_t begin, int64_t end) {
  int64_t last_of[kWidth];  // of the rows at work
  scan_rows<R>(args, begin, end, [&](int64_t row, int64_t first, int64_t count, R* out) {
    int64_t& last = last_of[(row - begin) % kWidth];
    if (first + count == args.columns) last = last_masked(row_of<uint8_t>(args.mask, row), args.columns);
    kl_rewards<R>(args, row, first, count, out);
    if (last >= first && last < first + count) {
      const R score = static_cast<const R*>(args.scores)[row], clip = R(args.clip_score);
      out[last - first] += score < -clip ? -clip : score > clip ? clip : score;  // NaN stays NaN
    }
    memcpy(static_cast<R*>(args.rewards) + row * args.columns + first, out, count * sizeof(R));
  });
}

}  // namespace

void shaped_gae(const ShapedGae& args, int64_t begin, int64_t end) {
  args.float64 ? run<double>(args, begin, end) : run<float>(args, begin, end);
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
