// The activations of an MLP, rounded to T where the model's own modules round (csrc/generation/layers.cpp).
#pragma once

#include "rows.h"

namespace rlhf_fast::cuda {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// 0.5 x (1 + tanh(u)) = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3)
__device__ __forceinline__ float gelu_tanh(float x) {
  return x * sigmoid(2 * 0.797884561f * (x + 0.044715f * x * x * x));
}

// The same as transformers' NewGELUActivation has it: a product or sum of tensors at a time. Its x^3 is torch.pow's,
// which in bfloat16 rounds each product.
template <typename T>
__device__ __forceinline__ float gelu_new(float x) {
  const float square = std::is_same_v<T, __nv_bfloat16> ? rounded<T>(x * x) : x * x;
  const float inner = rounded<T>(x + rounded<T>(0.044715f * rounded<T>(square * x)));
  return 0.5f * x * rounded<T>(1.0f + rounded<T>(tanhf(rounded<T>(0.797884561f * inner))));
}

// activation(x) of a number that a T can be, rounded to one.
template <typename T>
__device__ __forceinline__ float activated(Activation activation, float x) {
  switch (activation) {
    case Activation::relu: return x < 0 ? 0.0f : x;  // NaN stays NaN
    case Activation::silu: return rounded<T>(x * sigmoid(x));
    case Activation::gelu: return rounded<T>(0.5f * x * (1.0f + erff(x * 0.707106781f)));
    case Activation::gelu_tanh: return rounded<T>(gelu_tanh(x));
    case Activation::gelu_new: return rounded<T>(gelu_new<T>(x));
  }
  return x;
}

}  // namespace rlhf_fast::cuda
