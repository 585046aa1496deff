// Count, mean and squared deviations of masked numbers, and their normalisation: one read, then one read and one write.
//
// The numbers are cut into blocks of kWhitenBlock, whatever the threads; each block's moments are two sums over numbers
// in the first-level cache, and the blocks are merged from left to right (Chan, Golub and LeVeque 1983). So the bits do
// not depend on the threads, and no mean is ever squared. All in double.
#pragma once

#include <cstdint>

#include "isa.h"

namespace rlhf_fast {

constexpr int64_t kWhitenBlock = 2048;

struct Moments {
  double count = 0;
  double mean = 0;
  double squares = 0;  // sum of (x - mean)^2
};

struct MaskedNumbers {
  bool float64;
  int64_t size;
  const void* x;  // real: double or float
  const uint8_t* mask;
};

struct Whitening {
  double mean;
  double scale;
  double shift;  // added at the end
  void* out;     // real; 0 outside the mask
};

#define RLHF_FAST_DECLARE(isa)                                                                                 \
  namespace isa {                                                                                              \
  void block_moments(const MaskedNumbers& numbers, Moments* moments, int64_t begin_block, int64_t end_block);  \
  Moments merge(const Moments* moments, int64_t count);                                                        \
  void whiten(const MaskedNumbers& numbers, const Whitening& whitening, int64_t begin, int64_t end);           \
  }
RLHF_FAST_FOR_EACH_ISA(RLHF_FAST_DECLARE)
#undef RLHF_FAST_DECLARE

}  // namespace rlhf_fast
