#include "layers.h"

#include <math.h>

#include "functions.h"

namespace rlhf_fast::RLHF_FAST_ISA {
namespace {

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

template <typename T>
void embed_row(const T* row, float scale, float* y, int64_t size, bool add_to) {
  const Floats factor = splat(scale);
  for (int64_t i = 0; i < size; i += kWidth) {
    Floats value = mul(load_some(row, i, size), factor);
    if (add_to) value = add(value, load_some(y, i, size));
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

template <typename F>
void activate_with(const float* x, const float* factor, float* y, int64_t size, F f) {
  for (int64_t i = 0; i < size; i += kWidth) {
    const Floats value = f(load_some(x, i, size));
    store_some(y, i, size, factor ? mul(value, load_some(factor, i, size)) : value);
  }
}

}  // namespace

void embed(const Embedding& table, int64_t index, float* y, int64_t size, bool add) {
  const int64_t start = index * table.row_stride;
  switch (table.type) {
    case WeightType::float32:
      return embed_row(static_cast<const float*>(table.weight) + start, table.scale, y, size, add);
    case WeightType::bfloat16:
      return embed_row(static_cast<const bfloat16*>(table.weight) + start, table.scale, y, size, add);
    case WeightType::float16:
      return embed_row(static_cast<const float16*>(table.weight) + start, table.scale, y, size, add);
  }
}

void normalise(const Norm& norm, const float* x, float* y, int64_t size) {
  if (norm.kind == Norm::Kind::none) {
    for (int64_t i = 0; i < size; ++i) y[i] = x[i];
    return;
  }
  float mean = 0;
  if (norm.kind == Norm::Kind::layer) mean = sum_of(x, size, [](Floats v) { return v; }) / float(size);
  const Floats shift = splat(mean);
  const float square = sum_of(x, size, [shift](Floats v) {
    const Floats centred = sub(v, shift);
    return mul(centred, centred);
  });
  const Floats factor = splat(1.0f / sqrtf(square / float(size) + norm.epsilon));
  for (int64_t i = 0; i < size; i += kWidth) {
    Floats value = mul(sub(load_some(x, i, size), shift), factor);
    if (norm.weight) value = mul(value, load_some(norm.weight, i, size));
    if (norm.bias) value = add(value, load_some(norm.bias, i, size));
    store_some(y, i, size, value);
  }
}

void rotate(const Rotary& rotary, int64_t position, float* x) {
  const int64_t half = rotary.size / 2, step = rotary.interleaved ? 2 : 1, other = rotary.interleaved ? 1 : half;
  const float *cos = rotary.cos + position * half, *sin = rotary.sin + position * half;
  for (int64_t i = 0; i < half; ++i) {
    float &first = x[step * i], &second = x[step * i + other];
    const float a = first, b = second;
    first = a * cos[i] - b * sin[i];
    second = b * cos[i] + a * sin[i];
  }
}

void activate(Activation activation, const float* x, const float* factor, float* y, int64_t size) {
  switch (activation) {
    case Activation::relu:
      return activate_with(x, factor, y, size, [](Floats v) { return max(splat(0.0f), v); });
    case Activation::silu:
      return activate_with(x, factor, y, size, [](Floats v) { return mul(v, sigmoid(v)); });
    case Activation::gelu_tanh:  // 0.5 x (1 + tanh(u)) = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3)
      return activate_with(x, factor, y, size, [](Floats v) {
        const Floats u = mul(v, fma(mul(v, v), splat(2 * 0.797884561f * 0.044715f), splat(2 * 0.797884561f)));
        return mul(v, sigmoid(u));
      });
    case Activation::gelu:
      for (int64_t i = 0; i < size; ++i) {
        y[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.707106781f)) * (factor ? factor[i] : 1.0f);
      }
  }
}

void add_scaled(const float* x, float scale, float* y, int64_t size) {
  const Floats factor = splat(scale);
  for (int64_t i = 0; i < size; i += kWidth) {
    store_some(y, i, size, fma(load_some(x, i, size), factor, load_some(y, i, size)));
  }
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
