// device.h's matrix instructions on registers that Python fills, so that a GPU and its emulation can be compared bit by
// bit.
#include "device.h"

namespace rlhf_fast::cuda {
namespace {

// a [32, 4] and b [32, 2] words, d [32, 4]: a lane's registers a row.
template <typename T>
__global__ void multiply_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  uint32_t left[4], right[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) left[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) right[i] = b[2 * lane + i];
  for (int i = 0; i < 4; ++i) sums[i] = d[4 * lane + i];
  mma_m16n8k16<T>(sums, left, right);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = sums[i];
}

// Row `lane` of shared memory is 16 bytes of `rows` [32, 4]; registers [32, 4] come out.
template <bool kTransposed>
__global__ void load_kernel(const uint32_t* rows, uint32_t* registers) {
  __shared__ __align__(16) uint32_t shared[32][4];
  const int lane = threadIdx.x;
  for (int i = 0; i < 4; ++i) shared[lane][i] = rows[4 * lane + i];
  __syncwarp();
  uint32_t found[4];
  if (kTransposed) {
    load_matrix_x4_transposed(found, shared[lane]);
  } else {
    load_matrix_x4(found, shared[lane]);
  }
  for (int i = 0; i < 4; ++i) registers[4 * lane + i] = found[i];
}

}  // namespace
}  // namespace rlhf_fast::cuda

#if !defined(__CUDACC_RTC__)  // the host half
using namespace rlhf_fast::cuda;

extern "C" void multiply_bfloat16(const uint32_t* a, const uint32_t* b, float* d) {
  launch<multiply_kernel<__nv_bfloat16>>(dim3(1), dim3(32), 0, nullptr, a, b, d);
}

extern "C" void multiply_float16(const uint32_t* a, const uint32_t* b, float* d) {
  launch<multiply_kernel<__half>>(dim3(1), dim3(32), 0, nullptr, a, b, d);
}

extern "C" void load_rows(const uint32_t* rows, uint32_t* registers) {
  launch<load_kernel<false>>(dim3(1), dim3(32), 0, nullptr, rows, registers);
}

extern "C" void load_columns(const uint32_t* rows, uint32_t* registers) {
  launch<load_kernel<true>>(dim3(1), dim3(32), 0, nullptr, rows, registers);
}
#endif
