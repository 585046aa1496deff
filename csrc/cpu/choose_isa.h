// Which of the builds of a kernel (isa.h) this CPU runs.
#pragma once

#include <cstdlib>
#include <cstring>

#include "isa.h"

#if !defined(RLHF_FAST_ONLY)
#include <cpuid.h>
#endif

namespace rlhf_fast {
namespace {

// The best set that this CPU has whole. The environment variable ATEN_CPU_CAPABILITY lowers it, as it does PyTorch's.
inline Isa choose_isa() {
#if defined(RLHF_FAST_ONLY)
  return Isa::RLHF_FAST_ONLY;
#else
  const char* const given = getenv("ATEN_CPU_CAPABILITY");
  const char* const limit = given ? given : "";
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  __builtin_cpu_init();
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && strcmp(limit, "default") != 0) return avx512 && strcmp(limit, "avx2") != 0 ? Isa::avx512 : Isa::avx2;
  return Isa::baseline;
#endif
}

inline Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

// Whether kernels for AVX-512 may also use vdpbf16ps, products of pairs of bfloat16.
inline bool multiplies_bfloat16() {
#if defined(__x86_64__)
  static const bool chosen = isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  return chosen;
#else
  return false;
#endif
}

}  // namespace
}  // namespace rlhf_fast
