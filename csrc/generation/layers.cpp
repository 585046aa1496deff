#include "layers.h"

#include <math.h>

#include "functions.h"

namespace rlhf_fast::RLHF_FAST_ISA {
namespace {

// Calls use(T()) with the C++ type of that name.
template <typename Use>
inline void with_type(WeightType type, Use use) {
  switch (type) {
    case WeightType::float32: return use(float());
    case WeightType::bfloat16: return use(bfloat16());
    case WeightType::float16: return use(float16());
  }
}

// The next values of x[0..size) from i on, zeros after its end.
template <typename T>
inline Floats load_some(const T* x, int64_t i, int64_t size) {
  if (i + kWidth <= size) return load(x + i);
  T last[kWidth] = {};
  for (int64_t j = i; j < size; ++j) last[j - i] = x[j];
  return load(last);
}

inline void store_some(float* y, int64_t i, int64_t size, Floats value) {
  if (i + kWidth <= size) return store(y + i, value);
  float last[kWidth];
  store(last, value);
  for (int64_t j = i; j < size; ++j) y[j] = last[j - i];
}

template <typename T, typename W>
void embed_row(const W* row, float scale, float* y, int64_t size, bool add_to) {
  const Floats factor = splat(scale);
  for (int64_t i = 0; i < size; i += kWidth) {
    Floats value = rounded<T>(mul(load_some(row, i, size), factor));
    if (add_to) value = rounded<T>(add(value, rounded<T>(load_some(y, i, size))));
    store_some(y, i, size, value);
  }
}

// The sum of f(x[i]) over the row, in an order that depends on its size alone.
template <typename F>
inline float sum_of(const float* x, int64_t size, F f) {
  Floats sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  int64_t i = 0;
  for (; i + 4 * kWidth <= size; i += 4 * kWidth)
    for (int64_t k = 0; k < 4; ++k) sums[k] = add(sums[k], f(load(x + i + k * kWidth)));
  for (; i + kWidth <= size; i += kWidth) sums[0] = add(sums[0], f(load(x + i)));
  float total = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  for (; i < size; ++i) {
    float last[kWidth];
    store(last, f(splat(x[i])));
    total += last[0];
  }
  return total;
}

template <typename T, typename F>
void activate_with(const float* x, const float* factor, float* y, int64_t size, F f) {
  for (int64_t i = 0; i < size; i += kWidth) {
    Floats value = rounded<T>(f(rounded<T>(load_some(x, i, size))));
    if (factor) value = rounded<T>(mul(value, rounded<T>(load_some(factor, i, size))));
    store_some(y, i, size, value);
  }
}

// 0.5 x (1 + tanh(u)) = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3)
inline Floats gelu_tanh(Floats x) {
  const Floats u = mul(x, fma(mul(x, x), splat(2 * 0.797884561f * 0.044715f), splat(2 * 0.797884561f)));
  return mul(x, sigmoid(u));
}

// x^3 as torch.pow has it: in bfloat16 a product at a time.
template <typename T>
inline Floats cube(Floats x) {
  return rounded<T>(mul(mul(x, x), x));
}
template <>
inline Floats cube<bfloat16>(Floats x) {
  return rounded<bfloat16>(mul(rounded<bfloat16>(mul(x, x)), x));
}

// The same as transformers' NewGELUActivation has it: a product or sum of tensors at a time.
template <typename T>
inline Floats gelu_new(Floats x) {
  const Floats inner = rounded<T>(add(x, rounded<T>(mul(splat(0.044715f), cube<T>(x)))));
  const Floats u = rounded<T>(mul(splat(0.797884561f), inner));
  return mul(mul(splat(0.5f), x), rounded<T>(add(splat(1.0f), rounded<T>(tanh(u)))));
}
template <>
inline Floats gelu_new<float>(Floats x) {
  return gelu_tanh(x);
}

template <typename T>
void activate_as(Activation activation, const float* x, const float* factor, float* y, int64_t size) {
  switch (activation) {
    case Activation::relu:
      return activate_with<T>(x, factor, y, size, [](Floats v) { return max(splat(0.0f), v); });
    case Activation::silu:
      return activate_with<T>(x, factor, y, size, [](Floats v) { return mul(v, sigmoid(v)); });
    case Activation::gelu_tanh:
      return activate_with<T>(x, factor, y, size, [](Floats v) { return gelu_tanh(v); });
    case Activation::gelu_new:
      return activate_with<T>(x, factor, y, size, [](Floats v) { return gelu_new<T>(v); });
    case Activation::gelu:
      return activate_with<T>(x, factor, y, size, [](Floats v) {
        float values[kWidth];
        store(values, v);
        for (float& value : values) value = 0.5f * value * (1.0f + erff(value * 0.707106781f));
        return load(values);
      });
  }
}

template <typename T>
void normalise_as(const Norm& norm, const float* x, float* y, int64_t size) {
  const auto value = [](Floats v) { return rounded<T>(v); };
  float mean = 0;
  if (norm.kind == Norm::Kind::layer) mean = sum_of(x, size, value) / float(size);
  const Floats shift = splat(mean);
  const float square = sum_of(x, size, [&](Floats v) {
    const Floats centred = sub(value(v), shift);
    return mul(centred, centred);
  });
  const Floats factor = splat(1.0f / sqrtf(square / float(size) + norm.epsilon));
  for (int64_t i = 0; i < size; i += kWidth) {
    Floats scaled = mul(sub(value(load_some(x, i, size)), shift), factor);
    if (norm.round_before_weight) scaled = rounded<T>(scaled);
    if (norm.weight) scaled = mul(scaled, load_some(norm.weight, i, size));
    if (norm.bias) scaled = add(scaled, load_some(norm.bias, i, size));
    store_some(y, i, size, rounded<T>(scaled));
  }
}

// (first, second) turned by the angles whose cosines and sines are given.
template <typename T>
inline void turn(Floats& first, Floats& second, Floats cos, Floats sin) {
  const Floats a = rounded<T>(first), b = rounded<T>(second);
  const Floats a_cos = rounded<T>(mul(a, cos)), b_sin = rounded<T>(mul(b, sin));
  const Floats b_cos = rounded<T>(mul(b, cos)), a_sin = rounded<T>(mul(a, sin));
  first = rounded<T>(sub(a_cos, b_sin));
  second = rounded<T>(add(b_cos, a_sin));
}

template <typename T>
void rotate_as(const Rotary& rotary, int64_t position, float* x) {
  const int64_t half = rotary.size / 2;
  const float *cos = rotary.cos + position * half, *sin = rotary.sin + position * half;
  for (int64_t i = 0; i < half; i += kWidth) {
    if (!rotary.interleaved) {
      Floats first = load_some(x, i, half), second = load_some(x + half, i, half);
      turn<T>(first, second, load_some(cos, i, half), load_some(sin, i, half));
      store_some(x, i, half, first);
      store_some(x + half, i, half, second);
      continue;
    }
    float evens[kWidth] = {}, odds[kWidth] = {};
    const int64_t count = half - i < kWidth ? half - i : kWidth;
    for (int64_t j = 0; j < count; ++j) evens[j] = x[2 * (i + j)], odds[j] = x[2 * (i + j) + 1];
    Floats first = rounded<T>(load(evens)), second = rounded<T>(load(odds));
    turn<float>(first, second, load_some(cos, i, half), load_some(sin, i, half));  // as Cohere does: rounded at the end
    store(evens, rounded<T>(first));
    store(odds, rounded<T>(second));
    for (int64_t j = 0; j < count; ++j) x[2 * (i + j)] = evens[j], x[2 * (i + j) + 1] = odds[j];
  }
}

template <typename T>
void add_scaled_as(const float* x, float scale, float* y, int64_t size) {
  const Floats factor = splat(scale);
  for (int64_t i = 0; i < size; i += kWidth) {
    const Floats value = rounded<T>(mul(rounded<T>(load_some(x, i, size)), factor));
    store_some(y, i, size, rounded<T>(add(value, rounded<T>(load_some(y, i, size)))));
  }
}

}  // namespace

void embed(WeightType type, const Embedding& table, int64_t index, float* y, int64_t size, bool add) {
  with_type(type, [&](auto as) {
    with_type(table.type, [&](auto stored) {
      const auto* const row = static_cast<const decltype(stored)*>(table.weight) + index * table.row_stride;
      embed_row<decltype(as)>(row, table.scale, y, size, add);
    });
  });
}

void normalise(WeightType type, const Norm& norm, const float* x, float* y, int64_t size) {
  if (norm.kind != Norm::Kind::none) {
    return with_type(type, [&](auto as) { normalise_as<decltype(as)>(norm, x, y, size); });
  }
  for (int64_t i = 0; i < size; ++i) y[i] = x[i];
}

void rotate(WeightType type, const Rotary& rotary, int64_t position, float* x) {
  with_type(type, [&](auto as) { rotate_as<decltype(as)>(rotary, position, x); });
}

void activate(WeightType type, Activation activation, const float* x, const float* factor, float* y, int64_t size) {
  with_type(type, [&](auto as) { activate_as<decltype(as)>(activation, x, factor, y, size); });
}

void add_scaled(WeightType type, const float* x, float scale, float* y, int64_t size) {
  with_type(type, [&](auto as) { add_scaled_as<decltype(as)>(x, scale, y, size); });
}

void round_to(WeightType type, float* x, int64_t size) {
  if (type == WeightType::float32) return;
  with_type(type, [&](auto as) {
    for (int64_t i = 0; i < size; i += kWidth) store_some(x, i, size, rounded<decltype(as)>(load_some(x, i, size)));
  });
}

void scale_and_cap(float* x, float scale, float cap, int64_t size) {
  if (scale == 1 && cap == 0) return;
  const Floats factor = splat(cap > 0 ? scale / cap : scale), bound = splat(cap);
  for (int64_t i = 0; i < size; i += kWidth) {
    Floats value = mul(load_some(x, i, size), factor);
    if (cap > 0) value = mul(bound, tanh(value));
    store_some(x, i, size, value);
  }
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
