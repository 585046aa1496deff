#include "exponentials.h"

#include <math.h>

#include "../cpu/simd.h"

namespace rlhf_fast::RLHF_FAST_ISA {
namespace {

constexpr double kLog2E = 1.44269504088896340736;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls use(lane, vector) on all of x[0..n), four lanes in turn: four chains of arithmetic in flight at once. The last
// vector is filled up with -inf, which neither the largest logit nor a sum sees.
template <typename Use>
inline void for_each_vector(const float* x, int64_t n, Use use) {
  int64_t j = 0;
  for (; j + 4 * kWidth <= n; j += 4 * kWidth) {
    use(0, load(x + j));
    use(1, load(x + j + kWidth));
    use(2, load(x + j + 2 * kWidth));
    use(3, load(x + j + 3 * kWidth));
  }
  for (; j + kWidth <= n; j += kWidth) use(0, load(x + j));
  if (j < n) {
    float last[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) last[i] = j + i < n ? x[j + i] : -HUGE_VALF;
    use(0, load(last));
  }
}

struct Exponential {
  Floats largest, scale;
  Exponential(float largest, double temperature)
      : largest(splat(largest)), scale(splat(float(kLog2E / temperature))) {}
  // At exp2's lowest argument it is 0; NaN stays NaN.
  Floats operator()(Floats x) const { return exp2(max(splat(-127.0f), mul(sub(x, largest), scale))); }
};

}  // namespace

void block_maxima(const float* x, int64_t n, float* maxima) {
  for (int64_t j = 0; j < n; j += kExponentialsBlock) {
    Floats top[4];
    for (Floats& lane : top) lane = splat(-HUGE_VALF);
    for_each_vector(x + j, smaller(n - j, kExponentialsBlock), [&](int lane, Floats v) __attribute__((always_inline)) {
      top[lane] = max(top[lane], v);
    });
    *maxima++ = largest(max(max(top[0], top[1]), max(top[2], top[3])));
  }
}

void block_sums(const float* x, int64_t n, float largest, double temperature, float* sums) {
  const Exponential exponential(largest, temperature);
  for (int64_t j = 0; j < n; j += kExponentialsBlock) {
    Floats lanes[4] = {};
    for_each_vector(x + j, smaller(n - j, kExponentialsBlock), [&](int lane, Floats v) __attribute__((always_inline)) {
      lanes[lane] = add(lanes[lane], exponential(v));
    });
    *sums++ = sum(add(add(lanes[0], lanes[1]), add(lanes[2], lanes[3])));
  }
}

void exponentials(const float* x, int64_t n, float largest, double temperature, float* out) {
  const Exponential exponential(largest, temperature);
  int64_t j = 0;
  for_each_vector(x, n, [&](int, Floats v) __attribute__((always_inline)) {
    const Floats e = exponential(v);
    if (n - j >= kWidth) {
      store(out + j, e);
    } else {
      float last[kWidth];
      store(last, e);
      for (int64_t i = 0; j + i < n; ++i) out[j + i] = last[i];
    }
    j += kWidth;
  });
}

int64_t select(const float* x, int64_t n, float floor, int32_t* places) {
  const Floats low = splat(floor);
  int64_t count = 0, j = 0;
  for (; j + kWidth <= n; j += kWidth) {
    for (uint32_t bits = at_least(load(x + j), low); bits != 0; bits &= bits - 1) {
      places[count++] = int32_t(j + __builtin_ctz(bits));
    }
  }
  for (; j < n; ++j) {
    if (x[j] >= floor) places[count++] = int32_t(j);
  }
  return count;
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
