// Kernels with one bug each, of 64 threads a block. Without the bug each writes out[i] = i; x[i] is i.
#include "case.h"

namespace {

// Races.

KERNEL(no_barrier_before_reading) {
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x;
  s[63 - i] = a.x[63 - i];
  a.out[i] = s[i];
}

KERNEL(no_barrier_before_overwriting) {
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x;
  float wrong = 0;
  for (int round = 0; round < 3; ++round) {
    s[i] = float(i + round);
    __syncthreads();
    wrong += s[63 - i] - float(63 - i + round);
  }
  a.out[i] = a.x[i] + wrong;
}

KERNEL(no_warp_barrier) {
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x;
  s[i ^ 1] = a.x[i ^ 1];
  a.out[i] = s[i];
}

KERNEL(warp_barrier_of_half_a_warp) {
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x;
  s[i ^ 16] = a.x[i ^ 16];
  __syncwarp(i % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  a.out[i] = s[i];
}

KERNEL(shuffle_as_a_barrier) {
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x;
  s[i ^ 1] = a.x[i ^ 1];
  const float zero = warp_max(0.0f);
  a.out[i] = s[i] + zero;
}

KERNEL(plain_increment) {
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x;
  if (i == 0) s[0] = 0;
  __syncthreads();
  s[0] += 1;
  __syncthreads();
  a.out[i] = a.x[i] + s[0] - 64;
}

KERNEL(no_barrier_before_atomic) {
  __shared__ int count;
  const int i = threadIdx.x;
  if (i == 0) count = 0;
  atomicAdd(&count, 1);
  __syncthreads();
  a.out[i] = a.x[i] + float(count - 64);
}

KERNEL(two_blocks_one_place) { a.out[threadIdx.x] = a.x[threadIdx.x]; }

KERNEL(last_block_without_fence) {
  __shared__ bool last;
  const int i = threadIdx.x;
  if (i == 0) {
    a.scratch[blockIdx.x] = 1;
    last = atomicAdd(a.counter, 1) == int(gridDim.x) - 1;
  }
  __syncthreads();
  __threadfence();
  if (last) a.out[i] = a.x[i] + a.scratch[0] - 1;
}

KERNEL(last_block_without_fence_before_reading) {
  __shared__ bool last;
  const int i = threadIdx.x;
  if (i == 0) {
    a.scratch[blockIdx.x] = 1;
    __threadfence();
    last = atomicAdd(a.counter, 1) == int(gridDim.x) - 1;
  }
  __syncthreads();
  if (last) a.out[i] = a.x[i] + a.scratch[0] - 1;
}

KERNEL(last_block_of_another_counter) {
  __shared__ bool last;
  const int i = threadIdx.x;
  if (i == 0) {
    a.scratch[blockIdx.x] = 1;
    __threadfence();
    last = atomicAdd(a.counter + blockIdx.x, 1) == 0 && blockIdx.x == 1;
  }
  __syncthreads();
  __threadfence();
  if (last) a.out[i] = a.x[i] + a.scratch[0] - 1;
}

// Memory that nobody has written.

KERNEL(unwritten_dynamic_shared) {
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x;
  if (i != 40) s[i] = 0;
  __syncthreads();
  a.out[i] = a.x[i] + s[i];
}

KERNEL(unwritten_static_shared) {
  __shared__ float s[64];
  const int i = threadIdx.x;
  if (i != 40) s[i] = 0;
  __syncthreads();
  a.out[i] = a.x[i] + s[i];
}

KERNEL(shared_of_the_block_before) {
  __shared__ float s[64];
  const int i = threadIdx.x;
  if (blockIdx.x == 0) s[i] = a.x[i];
  if (blockIdx.x == 1) a.out[i] = s[i];
}

KERNEL(unwritten_buffer) { a.out[threadIdx.x] = a.scratch[threadIdx.x] > 0 ? 0 : a.x[threadIdx.x]; }

// Asynchronous copies.

KERNEL(copy_without_wait) {
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x;
  if (i < 16) copy_async16(s + 4 * i, a.x + 4 * i);
  copy_async_commit();
  __syncthreads();
  a.out[i] = s[i];
  copy_async_wait<0>();
}

KERNEL(copy_waits_for_one_too_few) {
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x;
  if (i < 8) copy_async16(s + 4 * i, a.x + 4 * i);
  copy_async_commit();
  if (i < 8) copy_async16(s + 32 + 4 * i, a.x + 32 + 4 * i);
  copy_async_commit();
  copy_async_wait<1>();
  __syncthreads();
  a.out[i] = s[i];
  copy_async_wait<0>();
}

KERNEL(copy_without_barrier) {
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x;
  if (i < 16) copy_async16(s + 4 * i, a.x + 4 * i);
  copy_async_commit();
  copy_async_wait<0>();
  a.out[63 - i] = s[63 - i];
}

KERNEL(copy_onto_what_others_read) {
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x;
  s[i] = a.x[i];
  __syncthreads();
  const float value = s[63 - i];
  if (i < 16) copy_async16(s + 4 * i, a.scratch + 4 * i, false);
  copy_async_commit();
  copy_async_wait<0>();
  a.out[63 - i] = value;
}

KERNEL(copy_left_behind) {
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x;
  if (i < 16) copy_async16(s + 4 * i, a.x + 4 * i);
  copy_async_commit();
  a.out[i] = a.x[i];
}

KERNEL(copy_from_an_odd_address) {
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x;
  if (i < 15) copy_async16(s + 4 * i, a.x + 4 * i + 1);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  a.out[i] = i > 0 && i < 61 ? s[i - 1] : a.x[i];
}

// Out of bounds, and misaligned.

KERNEL(beyond_dynamic_shared) {
  DYNAMIC_SHARED(float, s);
  const int i = threadIdx.x;
  s[i + 1] = a.x[i];
  __syncthreads();
  a.out[i] = s[i + 1];
}

KERNEL(beyond_static_shared) {
  __shared__ float s[64], zeros[64];
  const int i = threadIdx.x;
  zeros[i] = 0;
  __syncthreads();
  s[i + a.counter[0] + 1] = a.x[i];
  __syncthreads();
  a.out[i] = i < 63 ? s[i + 1] : a.x[i];
  if (zeros[i] != 0) a.out[0] = 0;
}

KERNEL(reads_beyond_a_buffer) { a.out[threadIdx.x] = a.x[threadIdx.x + 1] - 1; }

KERNEL(writes_before_a_buffer) {
  const int i = threadIdx.x;
  a.out[i] = a.x[i];
  if (i == 0) a.out[-1] = 0;
}

KERNEL(vector_beyond_a_ragged_buffer) {  // x ends within the 16 bytes
  const int i = threadIdx.x;
  if (i >= 16) return;
  const Vector<float> v = load16(a.x + 4 * i);
  for (int j = 0; j < 4; ++j) a.out[4 * i + j] = 4 * i + j < 61 ? v.values[j] : float(4 * i + j);
}

KERNEL(misaligned_vector) {
  const int i = threadIdx.x;
  a.out[i] = i < 60 ? load16(a.x + i).values[0] : a.x[i];
}

KERNEL(misaligned_float4) {
  const int i = threadIdx.x;
  float4 four = make_float4(0, 0, 0, 0);
  if (i < 60) four = *reinterpret_cast<const float4*>(a.x + i);
  a.out[i] = i < 60 ? four.x + four.y + four.z + four.w - float(3 * i + 6) : a.x[i];
}

KERNEL(beyond_a_local_array) {
  float values[8] = {};
  const int i = threadIdx.x;
  for (int j = a.counter[0]; j <= 8; ++j) values[j] = a.x[i];
  a.out[i] = values[i % 8];
}

KERNEL(deep_recursion) {
  struct Deep {
    static float down(const float* x, int levels) {
      volatile float room[64];
      room[levels % 64] = x[0];
      return levels > 0 ? down(x, levels - 1) + room[levels % 64] : 0;
    }
  };
  const int i = threadIdx.x;
  a.out[i] = a.x[i] + Deep::down(a.x, 10000 + a.counter[0]);
}

KERNEL(division_by_zero) { a.out[threadIdx.x] = a.x[threadIdx.x] + float(64 / a.counter[0]); }

// Barriers and warps.

KERNEL(barrier_in_both_branches) {
  const int i = threadIdx.x;
  a.out[i] = a.x[i];
  if (i < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

KERNEL(barrier_for_some) {
  const int i = threadIdx.x;
  a.out[i] = a.x[i];
  if (i < 40) __syncthreads();
  __syncwarp();
}

KERNEL(return_before_a_barrier) {
  const int i = threadIdx.x;
  a.out[i] = a.x[i];
  if (i > 50) return;
  __syncthreads();
}

KERNEL(mask_without_the_caller) {
  const int i = threadIdx.x;
  a.out[i] = __shfl_sync(0x7fffffffu, a.x[i], i % 32);
}

KERNEL(lane_outside_the_mask) {
  const int i = threadIdx.x;
  float value = a.x[i];
  if (i % 32 < 16) value += 0 * __shfl_sync(0xffffu, value, 20);
  a.out[i] = value;
}

KERNEL(shuffle_in_a_branch) {
  const int i = threadIdx.x;
  float zero = 0;
  if (i % 32 < 16) zero = warp_sum(zero);
  a.out[i] = a.x[i] + zero;
}

KERNEL(lanes_in_different_shuffles) {
  const int i = threadIdx.x;
  float zero = 0;
  if (i % 2) {
    zero = __shfl_xor_sync(0xffffffffu, zero, 1);
  } else {
    zero = __shfl_xor_sync(0xffffffffu, zero, 2);
  }
  a.out[i] = a.x[i] + zero;
}

KERNEL(shuffle_with_lanes_that_returned) {
  const int i = threadIdx.x;
  a.out[i] = a.x[i];
  if (i % 32 > 20) return;
  a.out[i] = __shfl_sync(0xffffffffu, a.x[i], i % 32);
}

KERNEL(matrix_product_by_half_a_warp) {
  const int i = threadIdx.x;
  float d[4] = {};
  const uint32_t left[4] = {}, right[2] = {};
  if (i % 32 < 16) mma_m16n8k16<__half>(d, left, right);
  a.out[i] = a.x[i] + d[0];
}

KERNEL(waits_for_another_block) {
  const int i = threadIdx.x;
  const volatile int* const counter = a.counter;
  while (counter[0] < int(gridDim.x)) {
    if (counter[1] == -1) atomicAdd(a.counter, 1);
  }
  a.out[i] = a.x[i];
}

}  // namespace
