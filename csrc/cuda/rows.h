// Rows of float32, bfloat16 or float16 elements, read and written in chunks of 16 bytes.
//
// A thread's work is counted in chunks whether or not a row's place in memory allows access of 16 bytes: without, a
// chunk is read element by element and ends with zeros. So the order of a row's sums is the same in both cases.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device.h"
#include "kernels.h"

namespace rlhf_fast::cuda {

template <typename T>
constexpr int kChunk = Vector<T>::kSize;

#if !defined(__CUDACC_RTC__)
inline int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls use(T()) with the C++ type of that name.
template <typename Use>
void with_type(Type type, Use use) {
  switch (type) {
    case Type::float32: return use(float());
    case Type::bfloat16: return use(__nv_bfloat16());
    case Type::float16: return use(__half());
  }
}

// Calls use(std::true_type()) or use(std::false_type()).
template <typename Use>
void with_flag(bool flag, Use use) {
  flag ? use(std::true_type()) : use(std::false_type());
}

// Whether `p` and all that is a multiple of `steps` elements of T away from it can be read 16 bytes at a time.
template <typename T, typename... Steps>
bool is_aligned(const void* p, Steps... steps) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && ((steps % kChunk<T> == 0) && ...);
}
#endif

// The elements i, i + 1, ... of a row of `size`; zeros after its end.
template <bool kAligned, typename T>
__device__ __forceinline__ Vector<T> load_chunk(const T* row, int64_t i, int64_t size) {
  if constexpr (kAligned) {
    return load16(row + i);
  } else {
    Vector<T> chunk;
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) chunk.values[j] = i + j < size ? row[i + j] : from_float<T>(0);
    return chunk;
  }
}

template <bool kAligned, typename T>
__device__ __forceinline__ void store_chunk(T* row, int64_t i, int64_t size, const Vector<T>& chunk) {
  if constexpr (kAligned) {
    store16(row + i, chunk);
  } else {
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) {
      if (i + j < size) row[i + j] = chunk.values[j];
    }
  }
}

// The nearest number that a T can be.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

}  // namespace rlhf_fast::cuda
