// What a block does to one row besides products and attention: embedding, norm, rotation, activation, residual.
//
// Rows are float32. A row's arithmetic depends on its size alone, never on other rows.
#pragma once

#include <cstdint>

#include "../cpu/isa.h"
#include "linear.h"

namespace rlhf_fast {

struct Norm {
  enum class Kind { none, rms, layer };
  Kind kind = Kind::none;
  const float* weight = nullptr;  // [size], or null for ones
  const float* bias = nullptr;    // [size], or null for zeros
  float epsilon = 0;
};

// Rotary positions: the pair (x[i], x[i + size / 2]), or (x[2 i], x[2 i + 1]) when interleaved, turns by the angle i.
// The tables hold whatever scaling the model has; a head's components from `size` on stay.
struct Rotary {
  const float* cos = nullptr;  // [positions, size / 2]
  const float* sin = nullptr;
  int64_t size = 0;
  bool interleaved = false;
};

enum class Activation { relu, silu, gelu, gelu_tanh };

// Rows of a table, in place: y = scale * weight[index]
struct Embedding {
  const void* weight = nullptr;
  WeightType type = WeightType::float32;
  int64_t row_stride = 0;
  float scale = 1;
};

#define RLHF_FAST_DECLARE(isa)                                                                                        \
  namespace isa {                                                                                                     \
  void embed(const Embedding& table, int64_t index, float* y, int64_t size, bool add);                                \
  void normalise(const Norm& norm, const float* x, float* y, int64_t size); /* y may be x */                          \
  void rotate(const Rotary& rotary, int64_t position, float* x);            /* one head, in place */                  \
  void activate(Activation activation, const float* x, const float* factor, float* y, int64_t size);                  \
  void add_scaled(const float* x, float scale, float* y, int64_t size); /* y += scale * x */                          \
  void scale_and_cap(float* x, float scale, float cap, int64_t size);   /* cap 0: none, else cap * tanh(x / cap) */   \
  }
// activate: y = activation(x), times factor unless that is null.
RLHF_FAST_FOR_EACH_ISA(RLHF_FAST_DECLARE)
#undef RLHF_FAST_DECLARE

}  // namespace rlhf_fast
