// Tensor-core instructions, with the lanes' registers laid out as in the PTX manual ("Matrix multiply-accumulate
// operation using mma instruction", "ldmatrix").
#pragma once

#include "site.h"
#include "types.h"

namespace cuda_on_cpu {

enum class HalfType { bfloat16, float16 };

// d += a b for a [16, 16] and b [16, 8], products and sums in float.
//   a: register r of lane l has row l / 4 + 8 (r & 1), columns 2 (l % 4) + 8 (r >> 1) and the next
//   b: register r of lane l has column l / 4, rows 2 (l % 4) + 8 r and the next
//   d: register r of lane l has row l / 4 + 8 (r >> 1), column 2 (l % 4) + (r & 1)
void mma_m16n8k16(HalfType type, float* d, const uint32_t* a, const uint32_t* b, Site site);

// Four matrices of 8 rows of 16 bytes: lane 8 i + j names row j of matrix i, and gets bytes 4 (l % 4) to 4 (l % 4) + 3
// of row l / 4 of each, l being the lane. With `transposed`, elements of two bytes: column l / 4, rows 2 (l % 4) and
// the next.
void load_matrix_x4(uint32_t* d, const void* row, bool transposed, Site site);

}  // namespace cuda_on_cpu
