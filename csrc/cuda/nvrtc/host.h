// For the C++ compiler that makes the host half of a .cu file, where NVRTC makes the device half: it reads the kernels
// for their parameters and makes no code of them. So the words of CUDA that they use are declared here and nowhere
// defined.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "launch.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint4 {
  unsigned x, y, z, w;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

extern const dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
void __syncwarp();
void __threadfence();
float __shfl_xor_sync(unsigned mask, float value, int lanes);
double __shfl_xor_sync(unsigned mask, double value, int lanes);
unsigned __ballot_sync(unsigned mask, bool predicate);
int atomicAdd(int* address, int value);
size_t __cvta_generic_to_global(const void* address);
size_t __cvta_generic_to_shared(const void* address);

float __bfloat162float(__nv_bfloat16 x);
__nv_bfloat16 __float2bfloat16(float x);
uint16_t __bfloat16_as_ushort(__nv_bfloat16 x);
float __half2float(__half x);
__half __float2half(float x);
uint16_t __half_as_ushort(__half x);
unsigned __float_as_uint(float x);
int __popc(unsigned x);
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b);
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b);
