// The model's description (csrc/generation/model.h) in the words of the kernels (csrc/cuda/kernels.h).
#pragma once

#include "../../cuda/kernels.h"
#include "../model.h"

namespace rlhf_fast {

inline cuda::Type as_cuda(WeightType type) { return cuda::Type(type); }
inline cuda::Activation as_cuda(Activation activation) { return cuda::Activation(activation); }

inline cuda::Norm as_cuda(const Norm& norm) {
  return {cuda::Norm::Kind(norm.kind), norm.weight, norm.bias, norm.epsilon, norm.round_before_weight};
}

inline cuda::Rotary as_cuda(const Rotary& rotary) { return {rotary.cos, rotary.sin, rotary.size, rotary.interleaved}; }

inline cuda::Heads as_cuda(const Heads& heads) {
  return {heads.query_heads, heads.key_value_heads, heads.size,         heads.queries,
          heads.keys,        heads.values,          heads.query_stride, heads.key_value_stride};
}

inline cuda::Linear as_cuda(const Linear& layer) {
  return {layer.weight, as_cuda(layer.type), layer.out, layer.in, layer.row_stride, layer.transposed, layer.bias};
}

}  // namespace rlhf_fast
