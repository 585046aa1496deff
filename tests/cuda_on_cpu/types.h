// CUDA's types and built-in variables: vectors, half-precision numbers as they are stored, and the few that the host
// code names.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define CUDA_ON_CPU_VECTORS(type, name)                                                                   \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                                \
  struct alignas(16) name##4 { type x, y, z, w; };                                                        \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                        \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

CUDA_ON_CPU_VECTORS(float, float)
CUDA_ON_CPU_VECTORS(int, int)
CUDA_ON_CPU_VECTORS(unsigned, uint)
#undef CUDA_ON_CPU_VECTORS

// Half-precision numbers are for storage: kernels compute in float. Conversions round to nearest, ties to even.
struct __nv_bfloat16 {
  unsigned short bits;
};

struct __half {
  unsigned short bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

inline __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};  // NaN
  return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 0) {  // zero, or subnormal: a multiple of 2^-24
    const float magnitude = float(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

inline __half __float2half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const unsigned short sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {0x7fff};                                                   // NaN
  if (bits >= 0x477ff000) return {static_cast<unsigned short>(sign | 0x7c00)};              // rounds beyond 65504
  if (bits >= 0x38800000) {                                                                 // normal
    return {static_cast<unsigned short>(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13)};
  }
  // Subnormal: adding 1/2 leaves a multiple of 2^-24 in the sum's last bits, rounded by the processor.
  float magnitude;
  memcpy(&magnitude, &bits, 4);
  magnitude += 0.5f;
  memcpy(&bits, &magnitude, 4);
  return {static_cast<unsigned short>(sign | (bits - 0x3f000000))};
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __float2bfloat16(x); }
inline __half __float2half_rn(float x) { return __float2half(x); }

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };

// Those of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;
