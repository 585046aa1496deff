// What a block does to one row besides products and attention: embedding, norm, rotation, activation, residual.
//
// Rows are float32. A row's arithmetic depends on its size alone, never on other rows. Kernels round what they read and
// every result to the type that the model computes in, where the model's own modules do: the decoder's log-probs are to
// be those of training, which come from rounded numbers in half precision.
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
  bool round_before_weight = false;  // as Llama's RMSNorm does
};

// Rotary positions: the pair (x[i], x[i + size / 2]), or (x[2 i], x[2 i + 1]) when interleaved, turns by the angle i.
// The tables hold whatever scaling the model has; a head's components from `size` on stay.
struct Rotary {
  const float* cos = nullptr;  // [positions, size / 2]
  const float* sin = nullptr;
  int64_t size = 0;
  bool interleaved = false;
};

// gelu_new: gelu_tanh, each step of it rounded.
enum class Activation { relu, silu, gelu, gelu_tanh, gelu_new };

// Rows of a table, in place: y = scale * weight[index]
struct Embedding {
  const void* weight = nullptr;
  WeightType type = WeightType::float32;
  int64_t row_stride = 0;
  float scale = 1;
};

// y = table[index], or y += it
// y = norm(x); y may be x
// rotate turns one head x in place
// y = activation(x), times factor unless that is null
// y += scale * x
// x = cap * tanh(scale * x / cap), or scale * x for a cap of 0; never rounded
#define RLHF_FAST_DECLARE(isa)                                                                                        \
  namespace isa {                                                                                                     \
  void embed(WeightType type, const Embedding& table, int64_t index, float* y, int64_t size, bool add);               \
  void normalise(WeightType type, const Norm& norm, const float* x, float* y, int64_t size);                          \
  void rotate(WeightType type, const Rotary& rotary, int64_t position, float* x);                                     \
  void activate(WeightType type, Activation activation, const float* x, const float* factor, float* y, int64_t size); \
  void add_scaled(WeightType type, const float* x, float scale, float* y, int64_t size);                              \
  void round_to(WeightType type, float* x, int64_t size);                                                             \
  void scale_and_cap(float* x, float scale, float cap, int64_t size);                                                 \
  }
RLHF_FAST_FOR_EACH_ISA(RLHF_FAST_DECLARE)
#undef RLHF_FAST_DECLARE

}  // namespace rlhf_fast
