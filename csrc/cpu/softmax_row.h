// The softmax of one row of logits, and the gradient of a log-prob and of the entropy with respect to that row: what all
// ops on logits do, float32 and 16-bit rows by vectors, float64 rows one by one. Formulas: gather_logprobs.h.
#pragma once

#include <math.h>

#include "simd.h"

namespace rlhf_fast::RLHF_FAST_ISA {
namespace {

constexpr double kLog2E = 1.44269504088896340736;
constexpr double kLn2 = 0.69314718055994530942;

// Logits that are summed in float before the sum goes on in double: each lane adds a few dozen numbers at most, so
// that a large vocabulary loses none of its small probabilities. A block stays in the first-level cache between the
// search for its largest logit and the sum.
constexpr int64_t kBlock = 1024;

constexpr float kLowest = -127.0f;  // exp2's lowest argument; it gives 0

template <typename T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <typename T>
using Real = typename RealOf<T>::type;

inline double value(double x) { return x; }
inline float value(float x) { return x; }
template <typename T>
float value(T x) {  // of a 16-bit number
  T vector[kWidth] = {x};
  float values[kWidth];
  store(values, load(vector));
  return values[0];
}

inline void set(double* p, double x) { *p = x; }
inline void set(float* p, double x) { *p = float(x); }
template <typename T>
void set(T* p, double x) {
  T vector[kWidth];
  store(vector, splat(float(x)));
  *p = vector[0];
}

// x[0..count), count < kWidth, and -inf after it.
inline Floats load_last(const float* x, int64_t count) {
  float last[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) last[i] = i < count ? x[i] : -HUGE_VALF;
  return load(last);
}
template <typename T>
Floats load_last(const T* x, int64_t count) {
  float last[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) last[i] = i < count ? value(x[i]) : -HUGE_VALF;
  return load(last);
}

// Calls use(lane, vector) on all of x[0..n), four lanes in turn: four chains of additions in flight at once. With
// kFetchNext it asks for the next block meanwhile, which arrives while the arithmetic of this one goes on.
template <bool kFetchNext, typename T, typename Use>
inline void for_each_vector(const T* x, int64_t n, Use use) {
  int64_t j = 0;
  for (; j + 4 * kWidth <= n; j += 4 * kWidth) {
    if constexpr (kFetchNext) {
      constexpr int64_t kLine = 64 / sizeof(T);
      for (int64_t k = 0; k < 4 * kWidth; k += kLine) __builtin_prefetch(x + j + k + kBlock);
    }
    use(0, load(x + j));
    use(1, load(x + j + kWidth));
    use(2, load(x + j + 2 * kWidth));
    use(3, load(x + j + 3 * kWidth));
  }
  for (; j + kWidth <= n; j += kWidth) use(0, load(x + j));
  if (j < n) use(0, load_last(x + j, n - j));
}

// Of the logits seen so far, with t = (x - largest) * scale in base 2: sum of 2^t, and of 2^t * t.
struct Sums {
  double largest = -HUGE_VAL;
  // The logits equal to the largest are counted apart, where they were first met. Beside their 1 a float would lose the
  // others, and the log-prob of a token that is almost certain is made of the others alone.
  double at_largest = 0;
  double others = 0;
  double weighted = 0;

  double sum() const { return at_largest + others; }
  double log_sum() const { return at_largest > 0 ? log1p(at_largest - 1 + others) : log(others); }

  // A new largest logit shifts every t down by the same amount.
  void raise(double to, double scale) {
    if (sum() > 0) {
      const double shift = (largest - to) * scale, factor = ::exp2(shift);
      weighted = factor > 0 ? (weighted + shift * sum()) * factor : 0;
      others = sum() * factor;
      at_largest = 0;
    }
    largest = to;
  }
};

template <bool kEntropy, bool kHasNewLargest, typename T>
void add_exponentials(Sums& row, const T* x, int64_t n, double scale) {
  // Where all is -inf so far, x - largest would be NaN.
  const Floats m = splat(row.largest > -HUGE_VAL ? float(row.largest) : 0.0f);
  const Floats s = splat(float(scale)), zero = splat(0), one = splat(1);
  const Floats lowest = splat(kLowest);
  Floats sums[4] = {}, weighted[4] = {}, at_largest = {};
  for_each_vector<true>(x, n, [&](int lane, Floats v) __attribute__((always_inline)) {
    const Floats t = max(lowest, mul(sub(v, m), s));  // NaN stays NaN
    Floats e = exp2(t);
    if constexpr (kEntropy) weighted[lane] = fma(e, t, weighted[lane]);
    if constexpr (kHasNewLargest) {
      const Floats is_largest = greater(m, v, zero, one);
      at_largest = add(at_largest, is_largest);
      e = sub(e, is_largest);  // exactly 0 there, as 2^0 is exactly 1
    }
    sums[lane] = add(sums[lane], e);
  });
  row.at_largest += sum(at_largest);
  row.others += sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  if constexpr (kEntropy) row.weighted += sum(add(add(weighted[0], weighted[1]), add(weighted[2], weighted[3])));
}

template <bool kEntropy, typename T>
void add_block(Sums& row, const T* x, int64_t n, double scale) {
  Floats top[4];
  for (Floats& lane : top) lane = splat(float(row.largest));
  for_each_vector<false>(x, n, [&](int lane, Floats v) __attribute__((always_inline)) {
    top[lane] = max(top[lane], v);
  });
  const double to = largest(max(max(top[0], top[1]), max(top[2], top[3])));
  if (to > row.largest) {
    row.raise(to, scale);
    add_exponentials<kEntropy, true>(row, x, n, scale);
  } else {
    add_exponentials<kEntropy, false>(row, x, n, scale);
  }
}

template <bool kEntropy>
void add_block(Sums& row, const double* x, int64_t n, double scale) {
  double top = row.largest;
  for (int64_t j = 0; j < n; ++j) top = x[j] > top ? x[j] : top;
  if (top > row.largest) row.raise(top, scale);
  const double m = top > -HUGE_VAL ? top : 0;
  for (int64_t j = 0; j < n; ++j) {
    const double t = (x[j] - m) * scale, e = ::exp2(t);
    row.others += e;
    if (kEntropy && !(e == 0)) row.weighted += e * t;
  }
}

// What is known of a row once it has been read. "entropy" is 0 unless asked for.
struct Softmax {
  double largest;  // logit
  double log_sum;  // of exp((x - largest) / temperature)
  double entropy;
};

template <bool kEntropy, typename T>
Softmax read_row(const T* x, int64_t vocabulary, double temperature) {
  const double scale = kLog2E / temperature;
  Sums sums;
  for (int64_t j = 0; j < vocabulary; j += kBlock) {
    const int64_t n = vocabulary - j < kBlock ? vocabulary - j : kBlock;
    add_block<kEntropy>(sums, x + j, n, scale);
  }
  const double log_sum = sums.log_sum();
  return {sums.largest, log_sum, kEntropy ? log_sum - kLn2 * sums.weighted / sums.sum() : 0};
}

inline double logprob_of(double logit, const Softmax& row, double temperature) {
  return (logit - row.largest) / temperature - row.log_sum;
}

// dx[j] = p_j * (a + b * log2 p_j) with log2 p_j = (x[j] - m) * scale - log2_sum. dx may be x.
template <typename T>
void backward_row(const T* x, T* dx, int64_t n, double m, double scale, double log2_sum, double a, double b) {
  const Floats vm = splat(float(m)), vs = splat(float(scale)), vl = splat(float(-log2_sum));
  const Floats va = splat(float(a)), vb = splat(float(b)), lowest = splat(kLowest);
  const auto gradient = [&](Floats v) __attribute__((always_inline)) {
    const Floats t = max(lowest, fma(sub(v, vm), vs, vl));  // at kLowest p is 0, and so is the gradient
    return mul(exp2(t), fma(vb, t, va));
  };
  int64_t j = 0;
  for (; j + 2 * kWidth <= n; j += 2 * kWidth) {
    const Floats first = gradient(load(x + j)), second = gradient(load(x + j + kWidth));
    store(dx + j, first);
    store(dx + j + kWidth, second);
  }
  for (; j + kWidth <= n; j += kWidth) store(dx + j, gradient(load(x + j)));
  if (j < n) {
    T last[kWidth];
    store(last, gradient(load_last(x + j, n - j)));
    for (int64_t i = 0; j + i < n; ++i) dx[j + i] = last[i];
  }
}

void backward_row(const double* x, double* dx, int64_t n, double m, double scale, double log2_sum, double a, double b) {
  for (int64_t j = 0; j < n; ++j) {
    const double t = (x[j] - m) * scale - log2_sum, p = ::exp2(t);
    dx[j] = p == 0 ? 0 : p * (a + b * t);
  }
}

// The gradient of g * logprob(id) + h * entropy. dx may be x. Where g and h are 0 the row is not read.
template <typename T>
void write_gradient(const T* x, T* dx, int64_t vocabulary, const Softmax& row, int64_t id, double temperature, double g,
                    double h) {
  g /= temperature;
  h /= temperature;
  if (g == 0 && h == 0) {
    memset(dx, 0, vocabulary * sizeof(T));
    return;
  }
  const double logprob = logprob_of(value(x[id]), row, temperature);
  const double p = exp(logprob);
  // 1 - p as -expm1(log p): exact where p is almost 1
  const double dx_id = -g * expm1(logprob) - (p == 0 ? 0 : h * p * (logprob + row.entropy));
  backward_row(x, dx, vocabulary, row.largest, kLog2E / temperature, row.log_sum * kLog2E, -(g + h * row.entropy),
               -h * kLn2);
  set(dx + id, dx_id);
}

}  // namespace
}  // namespace rlhf_fast::RLHF_FAST_ISA
