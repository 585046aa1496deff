// A vector of floats, Floats, and the few operations that the kernels need, for AVX-512, AVX2 or any other CPU.
// Loads and stores need no alignment and convert from and to bfloat16 and float16 (round to nearest even).
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

#if defined(RLHF_FAST_AVX512) || defined(RLHF_FAST_AVX2)
#include <immintrin.h>
#endif

namespace rlhf_fast {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

namespace RLHF_FAST_ISA {

#if defined(RLHF_FAST_AVX512)

using Floats = __m512;
constexpr int64_t kWidth = 16;

inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
// a * b + c
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// The larger one; b when b is NaN.
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
// Lane by lane a > b ? x : y. A comparison with NaN is false.
inline Floats greater(Floats a, Floats b, Floats x, Floats y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}
inline float sum(Floats a) { return _mm512_reduce_add_ps(a); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a); }
// A bit for each lane: whether a >= b.
inline uint32_t at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
// a * 2^(the low 9 bits of b's representation - 127); b's low bits 0 give 0.
inline Floats scale_by_bits(Floats a, Floats b) {
  return mul(a, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(b), 23)));
}

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load(const bfloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline Floats load(const float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
inline void store(bfloat16* p, Floats a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline void store(float16* p, Floats a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif defined(RLHF_FAST_AVX2)

using Floats = __m256;
constexpr int64_t kWidth = 8;

inline Floats splat(float x) { return _mm256_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats greater(Floats a, Floats b, Floats x, Floats y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
inline float sum(Floats a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline uint32_t at_least(Floats a, Floats b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
inline float largest(Floats a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline Floats scale_by_bits(Floats a, Floats b) {
  return mul(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(b), 23)));
}

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline Floats load(const bfloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Floats load(const float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
inline void store(bfloat16* p, Floats a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}
inline void store(float16* p, Floats a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else  // any CPU: the compiler's own 16-byte vectors (SSE2, NEON)

using Floats = float __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));
constexpr int64_t kWidth = 4;

inline Floats splat(float x) { return Floats{x, x, x, x}; }
inline Floats add(Floats a, Floats b) { return a + b; }
inline Floats sub(Floats a, Floats b) { return a - b; }
inline Floats mul(Floats a, Floats b) { return a * b; }
inline Floats div(Floats a, Floats b) { return a / b; }
inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats max(Floats a, Floats b) { return a > b ? a : b; }
inline Floats greater(Floats a, Floats b, Floats x, Floats y) { return a > b ? x : y; }
inline float sum(Floats a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline uint32_t at_least(Floats a, Floats b) {
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= uint32_t(a[i] >= b[i]) << i;
  return bits;
}
inline float largest(Floats a) {
  const float x = a[0] > a[2] ? a[0] : a[2], y = a[1] > a[3] ? a[1] : a[3];
  return x > y ? x : y;
}
inline Floats scale_by_bits(Floats a, Floats b) { return a * (Floats)(((Ints)b) << 23); }

inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float to_float(bfloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
inline float to_float(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest < 0x0400) return from_bits(sign | to_bits(float(rest) * 0x1p-24f));           // zero, subnormal
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x03ff) << 13);       // infinity, NaN
  return from_bits(sign | ((rest << 13) + ((127 - 15) << 23)));
}
inline bfloat16 to_bfloat16(float x) {
  if (x != x) return {0x7fc0};
  const uint32_t bits = to_bits(x);
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float16 to_float16(float x) {
  const uint32_t sign = to_bits(x) >> 16 & 0x8000, size = to_bits(x) & 0x7fffffff;
  if (size > 0x7f800000) return {uint16_t(sign | 0x7e00)};   // NaN
  if (size >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to infinity
  if (size < 0x38800000) {                                   // subnormal: units of 2^-24, rounded by adding 2^23
    const float units = from_bits(size) * 0x1p24f + 0x1p23f;
    return {uint16_t(sign | (to_bits(units) & 0x0fff))};
  }
  return {uint16_t(sign | ((size - ((127 - 15) << 23) + 0x0fff + (size >> 13 & 1)) >> 13))};
}

inline Floats load(const float* p) {
  Floats a;
  memcpy(&a, p, sizeof a);
  return a;
}
inline Floats load(const bfloat16* p) { return Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
inline Floats load(const float16* p) { return Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }

inline void store(float* p, Floats a) { memcpy(p, &a, sizeof a); }
inline void store(bfloat16* p, Floats a) {
  for (int i = 0; i < kWidth; ++i) p[i] = to_bfloat16(a[i]);
}
inline void store(float16* p, Floats a) {
  for (int i = 0; i < kWidth; ++i) p[i] = to_float16(a[i]);
}

#endif

using FourFloats = float __attribute__((vector_size(16)));

// The sums of the lanes of a, b, c and d, each added in the same order.
inline FourFloats sum4(Floats a, Floats b, Floats c, Floats d) {
#if defined(RLHF_FAST_AVX512)
  const auto halved = [](Floats v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); };
  const __m256 p = halved(a), q = halved(b), r = halved(c), s = halved(d);
#elif defined(RLHF_FAST_AVX2)
  const __m256 p = a, q = b, r = c, s = d;
#endif
#if defined(RLHF_FAST_AVX512) || defined(RLHF_FAST_AVX2)
  const __m256 pq = _mm256_add_ps(_mm256_unpacklo_ps(p, q), _mm256_unpackhi_ps(p, q));
  const __m256 rs = _mm256_add_ps(_mm256_unpacklo_ps(r, s), _mm256_unpackhi_ps(r, s));
  const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(pq, rs, 0x44), _mm256_shuffle_ps(pq, rs, 0xee));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#else
  return FourFloats{sum(a), sum(b), sum(c), sum(d)};
#endif
}

// 2^x for x in [-127, 127], to 1.4 units in the last place (8e-8); exactly 0 for x < -126.5; NaN for NaN.
// x is split into a whole number, which goes into the exponent, and r in [-0.5, 0.5]; the polynomial has the least
// relative error there (Remez).
inline Floats exp2(Floats x) {
  // Adding 1.5 * 2^23 rounds to a whole number, left in the low bits; the 127 more is the exponent's bias.
  const Floats magic = splat(0x1.8p23f + 127.0f);
  const Floats shifted = add(x, magic);
  const Floats r = sub(x, sub(shifted, magic));
  Floats p = fma(splat(0x1.41d334p-13f), r, splat(0x1.5f456ap-10f));
  p = fma(p, r, splat(0x1.3b2dbcp-7f));
  p = fma(p, r, splat(0x1.c6aed4p-5f));
  p = fma(p, r, splat(0x1.ebfbdap-3f));
  p = fma(p, r, splat(0x1.62e430p-1f));
  p = fma(p, r, splat(1.0f));
  return scale_by_bits(p, shifted);
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
