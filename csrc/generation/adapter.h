// Low-rank adapters beside linear layers (Hu et al. 2021, LoRA): y = x . W^T + bias + scale * (x . A^T) . B^T, with the
// weights W as they are. Never merged: the adapters are what is being trained.
#pragma once

#include <cstdint>
#include <vector>

#include "linear.h"

namespace rlhf_fast {

struct Adapter {
  Linear down, up;  // A [rank, in] and B [out, rank], both of one type: the model's or float32
  float scale;
};

// Adds to y, as linear() gives it for layers of the same x, what their adapters give. As in PEFT's layers each product
// of an adapter, the scaling and the sum are rounded to the adapter's type, and the layer's own output to `type`, the
// model's, before the sum. The bits of a row depend on that row alone, as in linear(). `scratch` grows as needed.
void add_adapters(WeightType type, const Linear* layers, int64_t count, const float* x, int64_t rows,
                  int64_t x_stride, float* y, int64_t y_stride, std::vector<float>& scratch,
                  std::vector<uint32_t>& pairs);

}  // namespace rlhf_fast
