// Arithmetic that reads the same on a vector of floats and on one double: what the kernels over tokens are written in.
// Lanes<float> is Floats, Lanes<double> a double; +, - and * are the compiler's own.
#pragma once

#include <math.h>

#include "simd.h"

namespace rlhf_fast::RLHF_FAST_ISA {

template <typename T>
struct LanesOf;
template <>
struct LanesOf<float> {
  using type = Floats;
  static constexpr int64_t width = kWidth;
};
template <>
struct LanesOf<double> {
  using type = double;
  static constexpr int64_t width = 1;
};
template <typename T>
using Lanes = typename LanesOf<T>::type;

// The same number in every lane.
template <typename N>
inline N all(double x);
template <>
inline Floats all<Floats>(double x) {
  return splat(float(x));
}
template <>
inline double all<double>(double x) {
  return x;
}

// Lane by lane a > b ? x : y. A comparison with NaN is false.
inline double greater(double a, double b, double x, double y) { return a > b ? x : y; }

// Not a number stays one.
template <typename N>
inline N clamp(N x, N low, N high) {
  return greater(x, high, high, greater(low, x, low, x));
}

// y where x is outside [low, high], else z.
template <typename N>
inline N outside(N x, N low, N high, N y, N z) {
  return greater(x, high, y, greater(low, x, y, z));
}

inline double add_lanes(double x) { return x; }
inline double add_lanes(Floats x) { return sum(x); }
inline double largest_lane(double x) { return x; }
inline double largest_lane(Floats x) { return largest(x); }

// e^x for x in [-80, 80].
inline double exponential(double x) { return exp(x); }
inline Floats exponential(Floats x) {
  // x / ln 2 in two parts: rounding it to one float would cost |x| units in the last place.
  const Floats whole = x * splat(1.44269502f), rest = fma(x, splat(1.44269502f), splat(0) - whole);
  return exp2(whole) * fma(rest + x * splat(1.92596303e-8f), splat(0.693147181f), splat(1));
}

// e^x - 1 - x for x in [-80, 80], without the cancellation near 0.
inline double exponential_beyond_linear(double x) { return expm1(x) - x; }
inline Floats exponential_beyond_linear(Floats x) {
  // Taylor's series to x^9: to 3e-9 of the result within +-0.5.
  Floats p = fma(x, splat(1 / 362880.f), splat(1 / 40320.f));
  p = fma(p, x, splat(1 / 5040.f));
  p = fma(p, x, splat(1 / 720.f));
  p = fma(p, x, splat(1 / 120.f));
  p = fma(p, x, splat(1 / 24.f));
  p = fma(p, x, splat(1 / 6.f));
  p = fma(p, x, splat(1 / 2.f));
  return outside(x, splat(-0.5f), splat(0.5f), exponential(x) - splat(1) - x, p * x * x);
}

// The first `count` of T's lanes, 0 in the others.
template <typename T>
inline Lanes<T> load_some(const T* p, int64_t count) {
  constexpr int64_t width = LanesOf<T>::width;
  if (count >= width) {
    if constexpr (width == 1) return *p;
    else return load(p);
  }
  T some[width];
  for (int64_t i = 0; i < width; ++i) some[i] = i < count ? p[i] : T(0);
  if constexpr (width == 1) return some[0];
  else return load(some);
}

// 1 where the mask is true, 0 elsewhere and beyond `count`.
template <typename T>
inline Lanes<T> load_mask(const bool* mask, int64_t count) {
  constexpr int64_t width = LanesOf<T>::width;
  T some[width];
  if (count >= width) {
    for (int64_t i = 0; i < width; ++i) some[i] = T(mask[i]);
  } else {
    for (int64_t i = 0; i < width; ++i) some[i] = i < count ? T(mask[i]) : T(0);
  }
  return load_some(some, width);
}

template <typename T>
inline void store_some(T* p, Lanes<T> x, int64_t count) {
  constexpr int64_t width = LanesOf<T>::width;
  if constexpr (width == 1) {
    if (count > 0) *p = x;
  } else if (count >= width) {
    store(p, x);
  } else {
    T some[width];
    store(some, x);
    for (int64_t i = 0; i < count; ++i) p[i] = some[i];
  }
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
