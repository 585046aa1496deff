// The model's pass as launches of csrc/cuda/kernels.h, over buffers on the device.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "../../cuda/kernels.h"
#include "../model.h"
#include "inputs.h"
#include "torch.h"

namespace rlhf_fast {

// Rows whose logits are in memory at once.
constexpr int64_t kLogitsRows = 64;

class CudaPass {
 public:
  // Activations are [tokens, size] of the model's type, without gaps; `workspace`, zeros at
  // first, is what products need for themselves, `scratch` what attention and sampling do.
  struct Buffers {
    void *hidden, *normed, *projected, *attended, *inner, *out, *attention_out, *workspace, *scratch;
    float* logits;  // [kLogitsRows, vocabulary]
  };
  struct Sizes {  // of them, in bytes; those of activations for one token
    int64_t hidden, normed, projected, attended, inner, workspace, scratch, logits;
  };

  static Sizes sizes(const Model& model, int64_t max_rows, int64_t max_positions);

  CudaPass(const Model& model, const cuda::PagedCache& cache, const Buffers& buffers, const Torch& torch);

  // Launches all blocks. Between layers it asks `interrupted`, and returns false when that says so. `positions` bounds
  // those of the kernel's sequences.
  bool run(const PassInputs& inputs, int64_t positions, const std::function<bool()>& interrupted, cuda::Stream stream);

  // Launches the logits of 1 to kLogitsRows of the pass's tokens, not scaled or capped yet. `places` and `zeros` hold a
  // number a row, on the device.
  void logits(const int32_t* places, const int32_t* zeros, int64_t rows, cuda::Stream stream);

 private:
  void attention(const Layer& layer, int64_t index, const PassInputs& inputs, int64_t positions, void* out);
  void mlp(const Layer& layer, int64_t rows);
  void add(const Norm& out_norm, const void* x, void* residual, const Norm* norm, int64_t rows);
  void project(std::span<const Linear> layers, const void* x, int64_t rows, void* y, WeightType out_type);

  const Model& model_;
  const cuda::PagedCache cache_;
  const Buffers buffers_;
  const Torch& torch_;
  const cuda::Type type_;
  cuda::Stream stream_ = nullptr;
};

}  // namespace rlhf_fast
