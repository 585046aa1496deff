// Counter-based random numbers: Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as
// 1, 2, 3"), the same numbers as rlhf_fast/generation/philox.py.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RLHF_FAST_ON_BOTH __host__ __device__
#else
#define RLHF_FAST_ON_BOTH
#endif

namespace rlhf_fast {

// Uniform in [0, 1), 53 random bits: key = the seed's two words, counter = (position, sample, 0, 0).
RLHF_FAST_ON_BOTH inline double uniform(uint64_t seed, uint32_t sample, uint32_t position) {
  uint32_t x0 = position, x1 = sample, x2 = 0, x3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(x0) * 0xD2511F53, p1 = uint64_t(x2) * 0xCD9E8D57;
    x0 = uint32_t(p1 >> 32) ^ x1 ^ k0;
    x1 = uint32_t(p1);
    x2 = uint32_t(p0 >> 32) ^ x3 ^ k1;
    x3 = uint32_t(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return double((uint64_t(x0) << 32 | x1) >> 11) * 0x1p-53;
}

}  // namespace rlhf_fast

#undef RLHF_FAST_ON_BOTH
