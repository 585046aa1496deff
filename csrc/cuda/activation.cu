#include "device.h"
#include "functions.h"
#include "kernels.h"
#include "rows.h"

namespace rlhf_fast::cuda {
namespace {

constexpr int kThreads = 256;

// A thread is a chunk of one row: block (row, part of the row). An SM's 2048 threads have 64 KiB on their way.
template <typename T, bool kAligned>
__global__ __launch_bounds__(kThreads) void activate_kernel(Activation activation, bool gated, const T* x,
                                                            int64_t x_row, T* inner, int64_t size) {
  const int64_t row = blockIdx.x;
  const int64_t i = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * kChunk<T>;
  if (i >= size) return;
  x += row * x_row;
  Vector<T> out = load_chunk<kAligned>(x, i, size), factor = {};
  if (gated) factor = load_chunk<kAligned>(x + size, i, size);
#pragma unroll
  for (int j = 0; j < kChunk<T>; ++j) {
    float value = activated<T>(activation, to_float(out.values[j]));
    if (gated) value *= to_float(factor.values[j]);
    out.values[j] = from_float<T>(value);
  }
  store_chunk<kAligned>(inner + row * size, i, size, out);
}

}  // namespace

#if !defined(__CUDACC_RTC__)  // the host half

void activate(Type type, Activation activation, bool gated, const void* x, int64_t x_row, void* inner, int64_t rows,
              int64_t size, Stream stream) {
  if (rows == 0) return;
  with_type(type, [&](auto element) {
    using T = decltype(element);
    with_flag(is_aligned<T>(x, x_row, size) && is_aligned<T>(inner), [&](auto flag) {
      const dim3 grid(rows, quotient_up(size, kThreads * kChunk<T>));
      launch<activate_kernel<T, flag.value>>(grid, dim3(kThreads), 0, stream, activation, gated,
                                             static_cast<const T*>(x), x_row, static_cast<T*>(inner), size);
    });
  });
}

#endif

}  // namespace rlhf_fast::cuda
