#include "device.h"
#include "kernels.h"
#include "rows.h"

namespace rlhf_fast::cuda {
namespace {

constexpr int kThreads = 128;

// A thread is a chunk of one row: block (token, part of the row). Everything is read once, and a batch of one still
// spreads over size / 1024 blocks.
template <typename T, bool kAligned>
__global__ __launch_bounds__(kThreads) void embed_kernel(const T* table, int64_t row_stride, float scale,
                                                         const int32_t* ids, const int32_t* position,
                                                         const T* positions, int64_t position_stride,
                                                         int64_t position_offset, T* x, int64_t size) {
  const int64_t token = blockIdx.x;
  const int64_t i = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * kChunk<T>;
  if (i >= size) return;
  const int64_t place = position[token];
  Vector<T> out = {};
  if (place >= 0) {
    out = load_chunk<kAligned>(table + ids[token] * row_stride, i, size);
#pragma unroll
    for (T& value : out.values) value = from_float<T>(scale * to_float(value));
    if (positions) {
      const auto added = load_chunk<kAligned>(positions + (place + position_offset) * position_stride, i, size);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        out.values[j] = from_float<T>(to_float(out.values[j]) + to_float(added.values[j]));
      }
    }
  }
  store_chunk<kAligned>(x + token * size, i, size, out);
}

}  // namespace

#if !defined(__CUDACC_RTC__)  // the host half

void embed(Type type, const void* table, int64_t row_stride, float scale, const int32_t* ids, const Tokens& tokens,
           const void* positions, int64_t position_stride, int64_t position_offset, void* x, int64_t size,
           Stream stream) {
  if (tokens.count == 0) return;
  with_type(type, [&](auto element) {
    using T = decltype(element);
    const bool aligned = is_aligned<T>(table, row_stride, size) && is_aligned<T>(x, size) &&
                         (!positions || is_aligned<T>(positions, position_stride));
    with_flag(aligned, [&](auto flag) {
      const dim3 grid(tokens.count, quotient_up(size, kThreads * kChunk<T>));
      launch<embed_kernel<T, flag.value>>(grid, dim3(kThreads), 0, stream, static_cast<const T*>(table), row_stride,
                                          scale, ids, tokens.position, static_cast<const T*>(positions),
                                          position_stride, position_offset, static_cast<T*>(x), size);
    });
  });
}

#endif

}  // namespace rlhf_fast::cuda
