// Rounding, exp, sigmoid and tanh on vectors. NaN stays NaN; where the float32 result would overflow it is bounded.
#pragma once

#include "../cpu/simd.h"

namespace rlhf_fast::RLHF_FAST_ISA {

// The nearest numbers that a T can be.
template <typename T>
inline Floats rounded(Floats x) {
  T values[kWidth];
  store(values, x);
  return load(values);
}
template <>
inline Floats rounded<float>(Floats x) {
  return x;
}

constexpr float kLog2E = 1.44269504f;

// e^x for x <= 0; exactly 0 below -87.7.
inline Floats exp_negative(Floats x) { return exp2(max(splat(-127.0f), mul(x, splat(kLog2E)))); }

// e^x for x <= 0 to 1e-4, 0 below -88: the one of PyTorch's attention in half precision (Malossi et al. 2015, Fast
// Exponential Computation on SIMD Architectures). 2^(n + r), 0 <= r < 1, is the float whose representation, an integer,
// is 2^23 (127 + n + r - c(r)) with a cubic c for 1 + r - 2^r.
inline Floats exp_of_attention(Floats x) {
  const Floats magic = splat(0x1.8p23f);  // adding it rounds to a whole number
  const Floats y = max(splat(-127.0f), mul(x, splat(kLog2E))), near = sub(add(y, magic), magic);
  const Floats r = sub(y, sub(near, greater(near, y, splat(1.0f), splat(0.0f))));
  Floats c = fma(r, splat(-0.0792042402f), splat(-0.224338365f));
  c = fma(r, c, splat(0.303542605f));
  c = fma(r, c, splat(0.000107034350f));
  float values[kWidth];
  store(values, max(splat(0.0f), fma(splat(0x1p23f), sub(y, c), splat(127 * 0x1p23f))));
  int32_t bits[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) bits[i] = int32_t(values[i]);
  memcpy(values, bits, sizeof bits);
  return add(load(values), sub(y, y));  // NaN for NaN
}

// e^x, with |x| bounded by 88.
inline Floats exp_bounded(Floats x) {
  const Floats zero = splat(0.0f), low = splat(-127.0f);
  const Floats negative = max(low, sub(zero, mul(x, splat(kLog2E))));
  return exp2(max(low, sub(zero, negative)));
}

inline Floats sigmoid(Floats x) {
  const Floats one = splat(1.0f);
  return div(one, add(one, exp_bounded(sub(splat(0.0f), x))));
}

inline Floats tanh(Floats x) {
  const Floats one = splat(1.0f);
  return sub(one, div(splat(2.0f), add(one, exp_bounded(add(x, x)))));
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
