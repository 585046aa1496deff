// What a kernel includes: CUDA and the few instructions that it lacks words for.
//
// Under nvcc and NVRTC these are the GPU's own, and so they are for the C++ compiler that makes the host half of what
// NVRTC compiles, which only reads them. Under a C++ compiler alone they are the twins of tests/cuda_on_cpu, with which
// the tests run the same sources on the CPU; docs/cuda_on_cpu.md says what a kernel keeps to for that.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#if !defined(__CUDACC_RTC__)
#include <cuda_runtime.h>
#endif

#include <cstdint>
#elif defined(RLHF_FAST_NVRTC_HOST)
#include "nvrtc/host.h"
#else
#include "cuda_on_cpu.h"
#define RLHF_FAST_ON_CPU
#endif

namespace rlhf_fast::cuda {

// Dynamic shared memory, 16-byte aligned, as an array of T named `name`.
#if !defined(RLHF_FAST_ON_CPU)
#define DYNAMIC_SHARED(T, name)                                 \
  extern __shared__ __align__(16) unsigned char dynamic_shared_[]; \
  T* const name = reinterpret_cast<T*>(dynamic_shared_)
#else
#define DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(cuda_on_cpu::dynamic_shared())
#endif

// launch<kernel>(...) runs kernel(arguments...) on the stream. A refused launch is what cudaGetLastError() tells.
#if defined(__CUDACC__) && !defined(__CUDACC_RTC__)
template <auto kKernel, typename... Arguments>
void launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {  // more than that is given to who asks
    cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  }
  kKernel<<<grid, block, shared_bytes, stream>>>(arguments...);
}
#elif defined(RLHF_FAST_ON_CPU)
template <auto kKernel, typename... Arguments>
void launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, Arguments... arguments) {
  cuda_on_cpu::launch<kKernel>(grid, block, shared_bytes, arguments...);
}
#endif

// Kernels compute in float and store any of three types, rounded to nearest.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half(x);
}

// Sixteen bytes, the most that one access takes.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

#if !defined(RLHF_FAST_ON_CPU)
template <typename T>
__device__ __forceinline__ Vector<T> as_vector(uint4 bits) {
  Vector<T> vector;
  *reinterpret_cast<uint4*>(&vector) = bits;
  return vector;
}

template <typename T>
__device__ __forceinline__ Vector<T> load16(const T* address) {
  return as_vector<T>(*reinterpret_cast<const uint4*>(address));
}

// For what is read once, as weights are: it takes no room in the first-level cache. No kernel of the launch writes it.
template <typename T>
__device__ __forceinline__ Vector<T> load16_streaming(const T* address) {
  uint4 bits;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(__cvta_generic_to_global(address)));
  return as_vector<T>(bits);
}

template <typename T>
__device__ __forceinline__ void store16(T* address, Vector<T> vector) {
  *reinterpret_cast<uint4*>(address) = *reinterpret_cast<const uint4*>(&vector);
}
#else
template <typename T>
__device__ __forceinline__ Vector<T> load16(const T* address) {
  cuda_on_cpu::check_aligned16(address, "load16");
  return *reinterpret_cast<const Vector<T>*>(address);
}

template <typename T>
__device__ __forceinline__ Vector<T> load16_streaming(const T* address) {
  return load16(address);
}

template <typename T>
__device__ __forceinline__ void store16(T* address, Vector<T> vector) {
  cuda_on_cpu::check_aligned16(address, "store16");
  *reinterpret_cast<Vector<T>*>(address) = vector;
}
#endif

// Asks for the memory around an address, which must be the launch's to read: it comes as near as the second-level
// cache.
#if !defined(RLHF_FAST_ON_CPU)
__device__ __forceinline__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
}
#else
inline void prefetch(const void*) {}
#endif

// Asynchronous copies of 16 bytes from global to shared memory, both addresses multiples of 16. Where `valid` is false
// zeros are written and `source` is not read. A thread's copies up to a commit are a group; copy_async_wait<N> waits
// for all of the thread's groups but the last N. Other threads see them after a barrier behind the wait.
//
// mma_m16n8k16: d += a b for a [16, 16] and b [16, 8] of T, spread over a warp's registers. With l the lane,
//   a[r] holds row l / 4 + 8 (r & 1), columns 2 (l % 4) + 8 (r >> 1) and the next,
//   b[r] holds column l / 4, rows 2 (l % 4) + 8 r and the next,
//   d[r] holds row l / 4 + 8 (r >> 1), column 2 (l % 4) + (r & 1).
//
// load_matrix_x4: four matrices of 8 rows of 16 bytes in shared memory; lane 8 i + j gives the address of row j of
// matrix i. d[i] becomes row l / 4, elements 2 (l % 4) and the next, of matrix i; with _transposed column l / 4.
#if !defined(RLHF_FAST_ON_CPU)
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void copy_async16(void* shared, const void* source, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(source)), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define RLHF_FAST_MMA(T, type)                                                                                    \
  template <>                                                                                                     \
  __device__ __forceinline__ void mma_m16n8k16<T>(float(&d)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) {   \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                           \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                           \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                             \
  }
RLHF_FAST_MMA(__nv_bfloat16, "bf16")
RLHF_FAST_MMA(__half, "f16")
#undef RLHF_FAST_MMA

__device__ __forceinline__ void load_matrix_x4(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}
#else
__device__ __forceinline__ void copy_async16(void* shared, const void* source, bool valid = true) {
  cuda_on_cpu::copy_async16(shared, source, valid);
}

__device__ __forceinline__ void copy_async_commit() { cuda_on_cpu::copy_async_commit(); }

template <int N>
__device__ __forceinline__ void copy_async_wait(CUDA_ON_CPU_SITE) {
  cuda_on_cpu::copy_async_wait(N, site);
}

template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             CUDA_ON_CPU_SITE) {
  using cuda_on_cpu::HalfType;
  constexpr HalfType kType = std::is_same_v<T, __half> ? HalfType::float16 : HalfType::bfloat16;
  cuda_on_cpu::mma_m16n8k16(kType, d, a, b, site);
}

__device__ __forceinline__ void load_matrix_x4(uint32_t (&d)[4], const void* row, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::load_matrix_x4(d, row, false, site);
}

__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&d)[4], const void* row, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::load_matrix_x4(d, row, true, site);
}
#endif

// The sum and the largest of a full warp's values, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

}  // namespace rlhf_fast::cuda
