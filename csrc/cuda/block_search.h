// Sums over a block's threads, and what a sampler finds by them: the key at which a running sum passes a goal.
//
// A sum is taken in double and in one order, however many terms are 0. So it never falls when a term is added, and a
// search by sums needs no sorted order.
#pragma once

#include "device.h"

namespace rlhf_fast::cuda {

// A step of a search: into four. Eight would take two thirds of the steps and twice the shuffles.
constexpr int kCuts = 3;

template <int kThreads>
struct BlockSums {
  double warps[kCuts][kThreads / 32];
};

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// values[i] = its sum over the block, the same bits in every thread.
template <int kThreads, int kSize>
__device__ __forceinline__ void block_sums(double (&values)[kSize], BlockSums<kThreads>& shared) {
  static_assert(kSize <= kCuts);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const double sum = warp_sum(values[i]);
    if (threadIdx.x % 32 == 0) shared.warps[i][threadIdx.x / 32] = sum;
    values[i] = 0;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    for (int warp = 0; warp < kThreads / 32; ++warp) values[i] += shared.warps[i][warp];
  }
  __syncthreads();
}

// The sum of the weights that `each` has. each(use) calls use(key, weight) for the thread's share of them.
template <int kThreads, typename Each>
__device__ __forceinline__ double block_total(Each each, BlockSums<kThreads>& shared) {
  double total[1] = {};
  each([&](uint32_t, double weight) { total[0] += weight; });
  block_sums(total, shared);
  return total[0];
}

// The least key in [low, high] for which the weights of all keys up to it are more than `goal` together; `high` when
// there is none.
template <int kThreads, typename Each>
__device__ __forceinline__ uint32_t first_beyond(uint32_t low, uint32_t high, double goal, Each each,
                                                 BlockSums<kThreads>& shared) {
  while (low < high) {
    uint32_t cuts[kCuts];
    double sums[kCuts] = {};
#pragma unroll
    for (int i = 0; i < kCuts; ++i) cuts[i] = low + uint32_t(uint64_t(high - low) * (i + 1) / (kCuts + 1));
    each([&](uint32_t key, double weight) {
#pragma unroll
      for (int i = 0; i < kCuts; ++i) sums[i] += key <= cuts[i] ? weight : 0.0;
    });
    block_sums(sums, shared);
#pragma unroll
    for (int i = kCuts - 1; i >= 0; --i) {
      if (sums[i] > goal) high = cuts[i];
    }
#pragma unroll
    for (int i = 0; i < kCuts; ++i) {
      if (!(sums[i] > goal)) low = cuts[i] + 1;
    }
  }
  return high;
}

}  // namespace rlhf_fast::cuda
