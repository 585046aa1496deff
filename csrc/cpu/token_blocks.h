// Tokens in blocks of fixed size, each summed by one thread: results do not depend on how many threads there are.
#pragma once

#include <cstdint>

#include "isa.h"

namespace rlhf_fast {

constexpr int64_t kTokenBlock = 4096;

namespace RLHF_FAST_ISA {
namespace {

// Vectors that are added up in float before the sum goes on in double.
constexpr int64_t kVectors = 32;

// Calls block(args, first token, end, sums of the block) for the blocks [begin, end).
template <typename Args, typename Block>
void for_each_block(const Args& args, int sums, int64_t begin, int64_t end, Block block) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i * kTokenBlock, last = first + kTokenBlock;
    block(args, first, last < args.tokens ? last : args.tokens, args.sums + i * sums);
  }
}

}  // namespace
}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
