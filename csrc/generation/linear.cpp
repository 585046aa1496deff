// Each output is a sum over k in one vector of accumulators: lane j adds the products of k = j, j + kWidth, ... in that
// order, and sum4 adds the lanes. Transposed weights have outputs in the lanes: each adds its products in the order of
// k. Whatever shape a micro-kernel has, whatever the blocks, that order stays.
#include "linear.h"

#include <omp.h>

#include "../cpu/simd.h"

namespace rlhf_fast::RLHF_FAST_ISA {
namespace {

// A micro-kernel computes kPanel outputs of up to kMostRows rows, all accumulators in registers.
constexpr int kPanel = 4;
#if defined(RLHF_FAST_AVX512)
constexpr int kMostRows = 6;
#else
constexpr int kMostRows = 3;
#endif

// Products that are worth the start of the threads.
constexpr int64_t kWorthThreads = 1 << 15;

struct Rows {
  const float* x;
  int64_t x_stride;
  float* y;
  int64_t y_stride;
};

template <typename T>
struct Weights {
  const T* weight;
  int64_t out, in, row_stride;
  const T* bias;
};

// p[0..count), count < kWidth, and zeros after it.
template <typename T>
Floats load_part(const T* p, int64_t count) {
  T part[kWidth] = {};
  memcpy(part, p, count * sizeof(T));
  return load(part);
}

// bias[n..n+4) as far as there are as many outputs.
template <typename T>
void load_bias(const Weights<T>& w, int64_t n, float* bias) {
  float values[kWidth] = {};
  const int64_t left = w.out - n < kPanel ? w.out - n : kPanel;
  if (w.bias) store(values, load_part(w.bias + n, left));
  memcpy(bias, values, kPanel * sizeof(float));
}

template <int kRows, typename T>
void panel(const Weights<T>& w, int64_t n, const Rows& rows) {
  const int64_t count = w.out - n < kPanel ? w.out - n : kPanel;
  const T* weight[kPanel];  // of a last, narrower panel some rows are computed twice
  for (int i = 0; i < kPanel; ++i) weight[i] = w.weight + (n + (i < count ? i : 0)) * w.row_stride;

  Floats sums[kRows][kPanel] = {};
  int64_t k = 0;
  for (; k + kWidth <= w.in; k += kWidth) {
    Floats x[kRows];
    for (int r = 0; r < kRows; ++r) x[r] = load(rows.x + r * rows.x_stride + k);
    for (int i = 0; i < kPanel; ++i) {
      const Floats v = load(weight[i] + k);
      for (int r = 0; r < kRows; ++r) sums[r][i] = fma(v, x[r], sums[r][i]);
    }
  }
  if (k < w.in) {
    for (int r = 0; r < kRows; ++r) {
      const Floats x = load_part(rows.x + r * rows.x_stride + k, w.in - k);
      for (int i = 0; i < kPanel; ++i) sums[r][i] = fma(load_part(weight[i] + k, w.in - k), x, sums[r][i]);
    }
  }

  float bias[kPanel];
  load_bias(w, n, bias);
  for (int r = 0; r < kRows; ++r) {
    float y[kPanel];
    sum4(sums[r], y);
    for (int i = 0; i < count; ++i) rows.y[r * rows.y_stride + n + i] = y[i] + bias[i];
  }
}

template <typename T>
void transposed_panel(const Weights<T>& w, int64_t n, const Rows& rows) {
  const int64_t count = w.out - n < kWidth ? w.out - n : kWidth;
  Floats sum = {};
  for (int64_t k = 0; k < w.in; ++k) {
    const T* const weight = w.weight + k * w.row_stride + n;
    sum = fma(splat(rows.x[k]), count == kWidth ? load(weight) : load_part(weight, count), sum);
  }
  if (w.bias) sum = add(sum, load_part(w.bias + n, count));
  float y[kWidth];
  store(y, sum);
  memcpy(rows.y + n, y, count * sizeof(float));
}

// Outputs [begin, end) of all rows; begin is a multiple of kWidth.
template <typename T>
void outputs(const Weights<T>& w, bool transposed, const Rows& rows, int64_t count, int64_t begin, int64_t end) {
  const auto from = [&](int64_t r) {
    return Rows{rows.x + r * rows.x_stride, rows.x_stride, rows.y + r * rows.y_stride, rows.y_stride};
  };
  if (transposed) {
    for (int64_t n = begin; n < end; n += kWidth) {
      for (int64_t r = 0; r < count; ++r) transposed_panel(w, n, from(r));
    }
    return;
  }
  for (int64_t n = begin; n < end; n += kPanel) {
    int64_t r = 0;
    for (; r + kMostRows <= count; r += kMostRows) panel<kMostRows>(w, n, from(r));
    for (; r < count; ++r) panel<1>(w, n, from(r));
  }
}

template <typename T>
void run(const Linear& layer, const Rows& rows, int64_t count) {
  const Weights<T> w{static_cast<const T*>(layer.weight), layer.out, layer.in, layer.row_stride,
                     static_cast<const T*>(layer.bias)};
  if (layer.out * layer.in * count < kWorthThreads) return outputs(w, layer.transposed, rows, count, 0, layer.out);
#pragma omp parallel
  {
    const int64_t blocks = (layer.out + kWidth - 1) / kWidth, thread = omp_get_thread_num();
    const int64_t threads = omp_get_num_threads();
    const int64_t begin = blocks * thread / threads * kWidth, end = blocks * (thread + 1) / threads * kWidth;
    outputs(w, layer.transposed, rows, count, begin, end < layer.out ? end : layer.out);
  }
}

}  // namespace

void linear(const Linear& layer, const float* x, int64_t rows, int64_t x_stride, float* y, int64_t y_stride) {
  const Rows all{x, x_stride, y, y_stride};
  switch (layer.type) {
    case WeightType::float32: return run<float>(layer, all, rows);
    case WeightType::bfloat16: return run<bfloat16>(layer, all, rows);
    case WeightType::float16: return run<float16>(layer, all, rows);
  }
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
