// What threads do together: barriers, shuffles and votes. barriers.cpp says how they meet.
#pragma once

#include <cstring>

#include "site.h"
#include "types.h"

namespace cuda_on_cpu {

enum class Vote { count, all, any };

// __syncthreads. Returns how many threads, whether all or any had a predicate other than 0.
int block_barrier(const char* name, int predicate, Vote vote, Site site);

// Runs once all the lanes have come, on each lane's value. What it leaves in values[i] is lane i's.
using Finish = void (*)(uint64_t* values, unsigned mask);

// Waits until all lanes of the mask have called it. Returns the value of lane `source`, which the mask must name.
uint64_t meet(const char* name, unsigned mask, uint64_t value, int source, Site site, Finish finish = nullptr);

// __syncwarp: a meeting that orders the lanes' memory accesses, as shuffles and votes do not.
void warp_barrier(unsigned mask, Site site);

void thread_fence(Site site);

int lane();

void ballot(uint64_t* values, unsigned mask);

template <typename T>
CUDA_ON_CPU_INLINE T shuffle(const char* name, unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = meet(name, mask, bits, source, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// The lane itself where `source` lies outside its segment of `width` lanes.
CUDA_ON_CPU_INLINE int within_segment(int source, int width) {
  const int first = lane() & ~(width - 1);
  return source >= first && source < first + width ? source : lane();
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_SITE cuda_on_cpu::Site site = cuda_on_cpu::Site::here()

CUDA_ON_CPU_INLINE void __syncthreads(CUDA_ON_CPU_SITE) {
  cuda_on_cpu::block_barrier("__syncthreads", 0, cuda_on_cpu::Vote::any, site);
}
CUDA_ON_CPU_INLINE int __syncthreads_count(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier("__syncthreads_count", predicate, cuda_on_cpu::Vote::count, site);
}
CUDA_ON_CPU_INLINE int __syncthreads_and(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier("__syncthreads_and", predicate, cuda_on_cpu::Vote::all, site);
}
CUDA_ON_CPU_INLINE int __syncthreads_or(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier("__syncthreads_or", predicate, cuda_on_cpu::Vote::any, site);
}
CUDA_ON_CPU_INLINE void __syncwarp(unsigned mask = ~0u, CUDA_ON_CPU_SITE) { cuda_on_cpu::warp_barrier(mask, site); }
CUDA_ON_CPU_INLINE void __threadfence(CUDA_ON_CPU_SITE) { cuda_on_cpu::thread_fence(site); }

template <typename T>
CUDA_ON_CPU_INLINE T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_SITE) {
  const int first = cuda_on_cpu::lane() & ~(width - 1);
  return cuda_on_cpu::shuffle("__shfl_sync", mask, value, first | (source & (width - 1)), site);
}
template <typename T>
CUDA_ON_CPU_INLINE T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_ON_CPU_SITE) {
  const int source = cuda_on_cpu::lane() ^ bits, end = (cuda_on_cpu::lane() & ~(width - 1)) + width;
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value, source < end ? source : cuda_on_cpu::lane(), site);
}
template <typename T>
CUDA_ON_CPU_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const int source = cuda_on_cpu::within_segment(cuda_on_cpu::lane() + int(delta), width);
  return cuda_on_cpu::shuffle("__shfl_down_sync", mask, value, source, site);
}
template <typename T>
CUDA_ON_CPU_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const int source = cuda_on_cpu::within_segment(cuda_on_cpu::lane() - int(delta), width);
  return cuda_on_cpu::shuffle("__shfl_up_sync", mask, value, source, site);
}

CUDA_ON_CPU_INLINE unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return unsigned(cuda_on_cpu::meet("__ballot_sync", mask, predicate != 0, cuda_on_cpu::lane(), site,
                                    cuda_on_cpu::ballot));
}
CUDA_ON_CPU_INLINE int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return __ballot_sync(mask, predicate, site) != 0;
}
CUDA_ON_CPU_INLINE int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return __ballot_sync(mask, !predicate, site) == 0;
}
