// What a pass takes in, laid out for the kernels: spans of tokens on the host -> arrays on the device.
#pragma once

#include <cstdint>
#include <vector>

#include "../../cuda/kernels.h"
#include "../backend.h"

namespace rlhf_fast {

// Spans of more tokens than this have their attention worked out by PyTorch.
constexpr int64_t kLongSpan = 16;

// A part of a prompt whose attention is PyTorch's work.
struct Prefill {
  int64_t first, count;  // tokens of the pass
  int64_t position;      // of the first
  const int32_t* pages;  // on the device
};

struct PassInputs {
  const int32_t* ids = nullptr;  // [tokens.count], on the device
  cuda::Tokens tokens{};
  int64_t attended = 0;           // how many of them, from the first on, are the attention kernel's
  std::vector<Prefill> prefills;  // the others
  int64_t positions = 0;          // of the longest of the kernel's sequences
};

class Inputs {
 public:
  struct Limits {
    int64_t rows, tokens, pages;  // spans and tokens of a pass, pages of a sequence
  };

  static int64_t bytes(const Limits& limits) { return 4 * (3 * limits.tokens + limits.rows * limits.pages); }

  // `host` (pinned) and `device`: addresses of bytes(limits). Page 0 begins at `pool`.
  Inputs(const Limits& limits, void* host, void* device, const char* pool, int64_t page_bytes);

  // Sends the spans' tokens to the device, made up to `count` by padding. `prefills`: whether long spans become such;
  // they come last. The stream must be done with what was sent before.
  PassInputs send(const std::vector<Span>& spans, int64_t count, bool prefills, cuda::Stream stream);

  // Where in the pass a token is, counted over the spans as they were given.
  int32_t place(int64_t token) const { return place_[token]; }

 private:
  const Limits limits_;
  int32_t *const host_, *const device_;
  const char* const pool_;
  const int64_t page_bytes_;
  std::vector<int32_t> place_;
};

}  // namespace rlhf_fast
