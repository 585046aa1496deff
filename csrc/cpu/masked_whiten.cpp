#include "masked_whiten.h"

#include "masked.h"

namespace rlhf_fast::RLHF_FAST_ISA {
namespace {

constexpr int64_t kLanes = 8;  // sums that go on side by side, on any CPU

// The sum of f(x[i]) over the mask.
template <typename R, typename F>
inline double masked_sum(const R* x, const uint8_t* mask, int64_t n, F f) {
  double sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += keep(f(double(x[i + lane])), mask[i + lane]);
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) sums[lane] += keep(f(double(x[i])), mask[i]);
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

template <typename R>
Moments moments_of(const R* x, const uint8_t* mask, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += mask[i] != 0;
  if (count == 0) return {};
  const double mean = masked_sum(x, mask, n, [](double v) { return v; }) / double(count);
  return {double(count), mean, masked_sum(x, mask, n, [=](double v) { return (v - mean) * (v - mean); })};
}

template <typename R>
void normalise(const MaskedNumbers& numbers, const Whitening& w, int64_t begin, int64_t end) {
  const R* const x = static_cast<const R*>(numbers.x);
  const uint8_t* const mask = numbers.mask;
  R* const __restrict out = static_cast<R*>(w.out);
  const double mean = w.mean, scale = w.scale, shift = w.shift;
  for (int64_t i = begin; i < end; ++i) out[i] = keep(R((x[i] - mean) * scale + shift), mask[i]);
}

}  // namespace

void block_moments(const MaskedNumbers& numbers, Moments* moments, int64_t begin_block, int64_t end_block) {
  for (int64_t block = begin_block; block < end_block; ++block) {
    const int64_t first = block * kWhitenBlock, rest = numbers.size - first;
    const int64_t n = rest < kWhitenBlock ? rest : kWhitenBlock;
    const uint8_t* const mask = numbers.mask + first;
    moments[block] = numbers.float64 ? moments_of(static_cast<const double*>(numbers.x) + first, mask, n)
                                     : moments_of(static_cast<const float*>(numbers.x) + first, mask, n);
  }
}

Moments merge(const Moments* moments, int64_t count) {
  Moments all;
  for (int64_t i = 0; i < count; ++i) {
    const Moments& m = moments[i];
    if (m.count == 0) continue;
    const double total = all.count + m.count, difference = m.mean - all.mean;
    all.squares += m.squares + difference * difference * all.count * m.count / total;
    all.mean += difference * m.count / total;
    all.count = total;
  }
  return all;
}

void whiten(const MaskedNumbers& numbers, const Whitening& whitening, int64_t begin, int64_t end) {
  numbers.float64 ? normalise<double>(numbers, whitening, begin, end)
                  : normalise<float>(numbers, whitening, begin, end);
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
