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
