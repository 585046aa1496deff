// Tensor-core instructions: the last lane to come computes for all 32.
#include "../matrix.h"

#include "../collectives.h"
#include "checker.h"
#include "machine.h"
#include "memory.h"

namespace cuda_on_cpu {
namespace {

struct Product {
  HalfType type;
  float* d;
  const uint32_t *a, *b;
};

struct Load {
  uint32_t* d;
  const char* row;
  bool transposed;
};

// The lower or the upper half of a register.
float half_of(HalfType type, uint32_t pair, int upper) {
  const auto bits = static_cast<unsigned short>(pair >> 16 * upper);
  return type == HalfType::bfloat16 ? __bfloat162float({bits}) : __half2float({bits});
}

void multiply(uint64_t* values, unsigned) {
  float a[16][16], b[16][8];
  const auto product = [&](int lane) { return *reinterpret_cast<const Product*>(values[lane]); };
  for (int l = 0; l < 32; ++l) {
    const Product p = product(l);
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r) {
        a[l / 4 + 8 * (r & 1)][2 * (l % 4) + half + 8 * (r >> 1)] = half_of(p.type, p.a[r], half);
      }
      for (int r = 0; r < 2; ++r) b[2 * (l % 4) + half + 8 * r][l / 4] = half_of(p.type, p.b[r], half);
    }
  }
  for (int l = 0; l < 32; ++l) {
    float* const d = product(l).d;
    for (int r = 0; r < 4; ++r) {
      const int row = l / 4 + 8 * (r >> 1), column = 2 * (l % 4) + (r & 1);
      for (int k = 0; k < 16; ++k) d[r] += a[row][k] * b[k][column];
    }
  }
}

void load(uint64_t* values, unsigned) {
  for (int l = 0; l < 32; ++l) {
    const Load& self = *reinterpret_cast<const Load*>(values[l]);
    for (int i = 0; i < 4; ++i) {
      const auto row = [&](int j) { return reinterpret_cast<const Load*>(values[8 * i + j])->row; };
      if (!self.transposed) {
        memcpy(&self.d[i], row(l / 4) + 4 * (l % 4), 4);
      } else {
        unsigned short pair[2];
        for (int half = 0; half < 2; ++half) memcpy(&pair[half], row(2 * (l % 4) + half) + 2 * (l / 4), 2);
        memcpy(&self.d[i], pair, 4);
      }
    }
  }
}

}  // namespace

void mma_m16n8k16(HalfType type, float* d, const uint32_t* a, const uint32_t* b, Site site) {
  site.caller = __builtin_return_address(0);
  const Product self{type, d, a, b};
  meet("mma", ~0u, reinterpret_cast<uint64_t>(&self), lane(), site, multiply);
}

void load_matrix_x4(uint32_t* d, const void* row, bool transposed, Site site) {
  site.caller = __builtin_return_address(0);
  check_aligned16(row, "ldmatrix", site.caller);
  watch(row, 16, Access::read, site.caller);
  const Load self{d, static_cast<const char*>(row), transposed};
  meet("ldmatrix", ~0u, reinterpret_cast<uint64_t>(&self), lane(), site, load);
}

}  // namespace cuda_on_cpu
