// Four columns of kWidth rows as vectors with a lane for each row, and back: recurrences along rows, many rows at once.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace rlhf_fast::RLHF_FAST_ISA {

typedef double Doubles __attribute__((vector_size(8 * kWidth)));

// Four floats of each of the rows 0, 4, 8, ..., side by side.
inline Floats load_quads(const float* p, int64_t row_stride) {
#if defined(RLHF_FAST_AVX512)
  const __m512 quad = _mm512_castps128_ps512(_mm_loadu_ps(p));
  const __m512 two = _mm512_insertf32x4(quad, _mm_loadu_ps(p + 4 * row_stride), 1);
  const __m512 three = _mm512_insertf32x4(two, _mm_loadu_ps(p + 8 * row_stride), 2);
  return _mm512_insertf32x4(three, _mm_loadu_ps(p + 12 * row_stride), 3);
#elif defined(RLHF_FAST_AVX2)
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * row_stride), 1);
#else
  return load(p);
#endif
}

inline void store_quads(float* p, int64_t row_stride, Floats a) {
#if defined(RLHF_FAST_AVX512)
  _mm_storeu_ps(p, _mm512_castps512_ps128(a));
  _mm_storeu_ps(p + 4 * row_stride, _mm512_extractf32x4_ps(a, 1));
  _mm_storeu_ps(p + 8 * row_stride, _mm512_extractf32x4_ps(a, 2));
  _mm_storeu_ps(p + 12 * row_stride, _mm512_extractf32x4_ps(a, 3));
#elif defined(RLHF_FAST_AVX2)
  _mm_storeu_ps(p, _mm256_castps256_ps128(a));
  _mm_storeu_ps(p + 4 * row_stride, _mm256_extractf128_ps(a, 1));
#else
  store(p, a);
#endif
}

// Turns each 4x4 square, which is a quad of each of the four vectors; its own inverse.
inline void transpose_squares(Floats (&v)[4]) {
#if defined(RLHF_FAST_AVX512)
  const __m512 low_ab = _mm512_unpacklo_ps(v[0], v[1]), high_ab = _mm512_unpackhi_ps(v[0], v[1]);
  const __m512 low_cd = _mm512_unpacklo_ps(v[2], v[3]), high_cd = _mm512_unpackhi_ps(v[2], v[3]);
  v[0] = _mm512_shuffle_ps(low_ab, low_cd, 0x44);
  v[1] = _mm512_shuffle_ps(low_ab, low_cd, 0xee);
  v[2] = _mm512_shuffle_ps(high_ab, high_cd, 0x44);
  v[3] = _mm512_shuffle_ps(high_ab, high_cd, 0xee);
#elif defined(RLHF_FAST_AVX2)
  const __m256 low_ab = _mm256_unpacklo_ps(v[0], v[1]), high_ab = _mm256_unpackhi_ps(v[0], v[1]);
  const __m256 low_cd = _mm256_unpacklo_ps(v[2], v[3]), high_cd = _mm256_unpackhi_ps(v[2], v[3]);
  v[0] = _mm256_shuffle_ps(low_ab, low_cd, 0x44);
  v[1] = _mm256_shuffle_ps(low_ab, low_cd, 0xee);
  v[2] = _mm256_shuffle_ps(high_ab, high_cd, 0x44);
  v[3] = _mm256_shuffle_ps(high_ab, high_cd, 0xee);
#else
  const Floats a = v[0], b = v[1], c = v[2], d = v[3];
  for (int i = 0; i < 4; ++i) v[i] = Floats{a[i], b[i], c[i], d[i]};
#endif
}

// out[c], lane i = p[i * row_stride + c]
inline void load_columns(const float* p, int64_t row_stride, Floats (&out)[4]) {
  for (int i = 0; i < 4; ++i) out[i] = load_quads(p + i * row_stride, row_stride);
  transpose_squares(out);
}
inline void store_columns(float* p, int64_t row_stride, Floats (&columns)[4]) {
  transpose_squares(columns);
  for (int i = 0; i < 4; ++i) store_quads(p + i * row_stride, row_stride, columns[i]);
}

inline void load_columns(const double* p, int64_t row_stride, Doubles (&out)[4]) {
  for (int c = 0; c < 4; ++c) {
    for (int64_t i = 0; i < kWidth; ++i) out[c][i] = p[i * row_stride + c];
  }
}
inline void store_columns(double* p, int64_t row_stride, const Doubles (&columns)[4]) {
  for (int c = 0; c < 4; ++c) {
    for (int64_t i = 0; i < kWidth; ++i) p[i * row_stride + c] = columns[c][i];
  }
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
