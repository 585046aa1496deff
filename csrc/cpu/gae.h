// Advantages and returns from rewards: scan.h on rows as they are.
#pragma once

#include "scan.h"

namespace rlhf_fast {

struct Gae : Scan {
  RowsOf rewards;
};

#define RLHF_FAST_DECLARE(isa)                            \
  namespace isa {                                         \
  void gae(const Gae& args, int64_t begin, int64_t end);  \
  }
RLHF_FAST_FOR_EACH_ISA(RLHF_FAST_DECLARE)
#undef RLHF_FAST_DECLARE

}  // namespace rlhf_fast
