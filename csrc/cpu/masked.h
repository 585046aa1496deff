// x or 0 without a branch, which would leave a loop scalar.
#pragma once

#include <cstdint>

#include "isa.h"

namespace rlhf_fast::RLHF_FAST_ISA {

inline float keep(float x, uint8_t mask) {
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, x) & -uint32_t(mask != 0));
}
inline double keep(double x, uint8_t mask) {
  return __builtin_bit_cast(double, __builtin_bit_cast(uint64_t, x) & -uint64_t(mask != 0));
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
