// What the CUDA backend asks of PyTorch, through Python: memory, large products, prompts' attention, CUDA graphs.
//
// All memory is PyTorch's, so that one allocator knows of all of it, and products of many rows are as fast as
// PyTorch's. Addresses are integers. What is done on the device goes to PyTorch's current stream.
#pragma once

#include <cstdint>
#include <functional>

namespace rlhf_fast {

struct Torch {
  // The address of that many bytes of zeros, on the device or pinned on the host, that live as long as the backend.
  std::function<uintptr_t(int64_t bytes, bool on_host)> allocate;

  // y = layer(x) for the linear layer whose weight lies at that address, adapters included. Rows are x_row and y_row
  // elements apart. y is of the model's type, or float32, not rounded before.
  std::function<void(uintptr_t weight, uintptr_t x, int64_t rows, int64_t x_row, uintptr_t y, int64_t y_row,
                     bool float32)>
      product;

  // The attention of `count` tokens of one sequence, the first of them at `position`. `pages`: the numbers, int32 on
  // the device, of the cache's pages up to the last of them. `projected` is the first token's row, prepared, the
  // next one `projected_row` elements further; `out` is where its output goes.
  std::function<void(int64_t layer, int64_t position, int64_t count, uintptr_t pages, uintptr_t projected,
                     int64_t projected_row, uintptr_t out)>
      attend;

  // Runs launch(stream), which is the same for the same `tokens`: true when it did, by a CUDA graph that it made of it;
  // false when it is to be launched as it is. May be empty.
  std::function<bool(int64_t tokens, const std::function<void(uintptr_t stream)>& launch)> replay;
};

}  // namespace rlhf_fast
