// A matrix product by tensor-core instructions alone: where their registers lie is what this file knows.
#include "device.h"

using namespace rlhf_fast::cuda;

namespace {

// d [16, 8] = a [16, 16] times b [16, 8] + 1, by one warp.
template <typename T>
__global__ void multiply_kernel(const T* a, const T* b, float* d) {
  DYNAMIC_SHARED(T, s);
  T* const left = s;             // [16, 16]
  T* const right = s + 16 * 16;  // [16, 8]
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * 16; i += 32) left[i] = a[i];
  for (int i = lane; i < 16 * 8; i += 32) right[i] = b[i];
  __syncwarp();
  uint32_t a_part[4], b_part[4];
  load_matrix_x4(a_part, left + lane % 16 * 16 + lane / 16 * 8);  // rows 0 to 7 and 8 to 15, then columns 8 to 15
  load_matrix_x4_transposed(b_part, right + lane % 16 * 8);       // the second half is the first once more
  float sum[4] = {1, 1, 1, 1};
  const uint32_t b_used[2] = {b_part[0], b_part[1]};
  mma_m16n8k16<T>(sum, a_part, b_used);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + 8 * (i >> 1)) * 8 + 2 * (lane % 4) + (i & 1)] = sum[i];
}

template <typename T>
void launch_multiply(const void* a, const void* b, float* d, cudaStream_t stream) {
  launch<multiply_kernel<T>>(dim3(1), dim3(32), (16 * 16 + 16 * 8) * sizeof(T), stream, static_cast<const T*>(a),
                             static_cast<const T*>(b), d);
}

}  // namespace

extern "C" void multiply(int64_t is_half, const void* a, const void* b, float* d, cudaStream_t stream) {
  if (is_half) {
    launch_multiply<__half>(a, b, d, stream);
  } else {
    launch_multiply<__nv_bfloat16>(a, b, d, stream);
  }
}
