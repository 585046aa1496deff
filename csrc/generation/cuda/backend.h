// A GPU as the step loop's device. It is a library of its own, without Python, so that the decoder for the CPU needs no
// CUDA compiler: of it the other one knows this header and the address of one function.
#pragma once

#include <cstdint>

#include "../backend.h"
#include "torch.h"

namespace rlhf_fast {

struct CudaSettings {
  int64_t max_rows = 0;       // sequences of a pass
  int64_t max_tokens = 0;     // of a pass
  int64_t max_positions = 0;  // of a sequence
  uintptr_t pool = 0;         // the cache's memory, as csrc/cuda/kernels.h lays it out
  int64_t pages = 0;          // of it
  bool penalty = false;       // whether draws come with sets of seen tokens
  uintptr_t stream = 0;       // a cudaStream_t
  Torch torch;
};

}  // namespace rlhf_fast

// The caller deletes it.
extern "C" __attribute__((visibility("default"))) rlhf_fast::Backend* rlhf_fast_cuda_backend(
    const rlhf_fast::Model& model, const rlhf_fast::CudaSettings& settings);

// Why CUDA does not run on this machine, or null.
extern "C" __attribute__((visibility("default"))) const char* rlhf_fast_cuda_problem();
