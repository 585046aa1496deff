// Kernels that are right, in ways that a checker may get wrong. Each writes out[i] = i; x[i] is i.
#include "case.h"

namespace {

KERNEL(reduction) {
  DYNAMIC_SHARED(float, s);
  __shared__ float sums[2];
  const int i = threadIdx.x;
  if (i < 16) copy_async16(s + 4 * i, a.x + 4 * i);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  const float sum = warp_sum(s[i]);
  if (i % 32 == 0) sums[i / 32] = sum;
  __syncthreads();
  a.out[i] = s[i] + sums[0] + sums[1] - 2016;
}

KERNEL(warp_barriers) {
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x;
  s[i] = a.x[i];
  __syncwarp();
  const float neighbour = s[i ^ 1];
  __syncwarp();
  s[i] = neighbour;
  __syncwarp();
  a.out[i] = s[i ^ 1];
}

KERNEL(half_warps_apart) {  // the halves take a different number of turns
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x, half = i / 16;
  const unsigned mask = half % 2 ? 0xffff0000u : 0x0000ffffu;
  s[i] = a.x[i];
  for (int turn = 0; turn < 2 * (1 + half); ++turn) {
    __syncwarp(mask);
    const float other = s[i ^ 8];
    __syncwarp(mask);
    s[i] = other;
  }
  float largest = float(i);
  for (int lanes = 8; lanes > 0; lanes /= 2) largest = fmaxf(largest, __shfl_xor_sync(mask, largest, lanes, 16));
  a.out[i] = s[i] + largest - float(16 * half + 15);
}

KERNEL(barrier_by_way_of_others) {  // lane 0 is ordered after lane 2 through lane 1
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x, lane = i % 32;
  if (lane == 2) s[i] = 0;
  if (lane == 1 || lane == 2) __syncwarp(0x6);
  if (lane == 0 || lane == 1) __syncwarp(0x3);
  a.out[i] = a.x[i] + (lane == 0 ? s[i + 2] : 0);
}

KERNEL(ragged_ballot) {
  const int i = threadIdx.x;
  const unsigned mask = __ballot_sync(0xffffffffu, i % 32 < 20);
  a.out[i] = a.x[i];
  if (i % 32 < 20) a.out[i] = __shfl_sync(mask, a.x[i], i % 32) + float(__popc(mask) - 20);
}

KERNEL(barriers_that_vote) {
  const int i = threadIdx.x;
  const int count = __syncthreads_count(i < 10);
  const int all = __syncthreads_and(i < 64), none = __syncthreads_or(i == 64);
  a.out[i] = a.x[i] + float(count - 10 + all - 1 + none);
}

KERNEL(atomic_operations) {
  __shared__ int sum, largest;
  const int i = threadIdx.x;
  if (i == 0) sum = 0, largest = -1;
  __syncthreads();
  atomicAdd(&sum, i);
  atomicMax(&largest, i);
  __syncthreads();
  a.out[i] = a.x[i] + float(sum - 2016 + largest - 63);
}

KERNEL(last_block) {
  __shared__ bool last;
  const int i = threadIdx.x;
  if (i == 0) {
    a.scratch[blockIdx.x] = 1;
    __threadfence();
    last = atomicAdd(a.counter, 1) == int(gridDim.x) - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  float count = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) count += a.scratch[block];
  a.out[i] = a.x[i] + count - float(gridDim.x);
  if (i == 0) *a.counter = 0;  // for the next launch
}

KERNEL(last_block_all_threads_write) {  // all write, all fence, a barrier, one counts
  __shared__ bool last;
  const int i = threadIdx.x, blocks = int(gridDim.x);
  if (i < 64 / blocks) a.scratch[i * blocks + int(blockIdx.x)] = 1;
  __threadfence();
  __syncthreads();
  if (i == 0) last = atomicAdd(a.counter, 1) == blocks - 1;
  __syncthreads();
  __threadfence();
  if (last) a.out[i] = a.x[i] + (i < 64 / blocks * blocks ? a.scratch[i] - 1 : 0);
}

KERNEL(last_block_fence_behind_a_barrier) {  // all write, a barrier, one fences and counts
  __shared__ bool last;
  const int i = threadIdx.x, blocks = int(gridDim.x);
  if (i < 64 / blocks) a.scratch[i * blocks + int(blockIdx.x)] = 1;
  __syncthreads();
  if (i == 0) {
    __threadfence();
    last = atomicAdd(a.counter, 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  if (last) a.out[i] = a.x[i] + (i < 64 / blocks * blocks ? a.scratch[i] - 1 : 0);
}

KERNEL(bytes_of_a_word) {  // a word's bytes belong to four threads, and then the word to one
  __shared__ __align__(4) unsigned char s[64];
  const int i = threadIdx.x;
  s[i] = static_cast<unsigned char>(i);
  __syncthreads();
  uint32_t word = 0;
  if (i < 16) word = reinterpret_cast<uint32_t*>(s)[i];
  if (i < 16) reinterpret_cast<uint32_t*>(s)[i] = word ^ 0x01010101u;
  __syncthreads();
  a.out[i] = float(s[i] ^ 1);
}

KERNEL(two_stages) {  // the second copy is on its way while the first half is read
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x;
  for (int half = 0; half < 2; ++half) {
    if (i < 8) copy_async16(s + 32 * half + 4 * i, a.x + 32 * half + 4 * i);
    copy_async_commit();
  }
  copy_async_wait<1>();
  __syncthreads();
  if (i < 32) a.out[i] = s[i];
  copy_async_wait<0>();
  __syncthreads();
  if (i < 8) copy_async16(s + 4 * i, a.x, false);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  if (i >= 32) a.out[i] = s[i] + s[i - 32];
}

KERNEL(local_arrays) {  // a thread's own memory, at addresses that other threads' have too
  float values[16];
  const int i = threadIdx.x;
  for (int j = 0; j < 16; ++j) values[(i + j) % 16] = a.x[i];
  __syncthreads();
  a.out[i] = values[i % 16];
}

}  // namespace
