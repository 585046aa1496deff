// One pass of the model over tokens of any number of sequences, prompts and answers alike.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "model.h"

namespace rlhf_fast {

// Consecutive tokens of one sequence, with pages for all positions up to the last one.
struct Span {
  std::vector<char*> pages;
  const int32_t* tokens;
  int64_t position;  // of the first
  int64_t count;
};

class Forward {
 public:
  explicit Forward(const Model& model) : model_(model), layout_(model.cache_layout()) {}

  // Runs all blocks, writes keys and values to the pages. A span may see pages that another span fills in the same
  // pass. Between layers it asks `interrupted` and returns false when that says so, with nothing to be used.
  bool run(const std::vector<Span>& spans, const std::function<bool()>& interrupted);

  // Logits [tokens.size(), vocabulary] of some of the pass's tokens, counted over all spans.
  const float* logits(const std::vector<int64_t>& tokens);

 private:
  void embed(const std::vector<Span>& spans);
  void attention(const Layer& layer, int64_t index, const std::vector<Span>& spans);
  void mlp(const Layer& layer);
  void norm(const Norm& norm, std::vector<float>& x, std::vector<float>& y);
  void add(const Norm& norm, std::vector<float>& x, std::vector<float>& y);

  const Model& model_;
  const CacheLayout layout_;
  int64_t tokens_ = 0, positions_ = 0;
  std::vector<float> hidden_, normed_, projected_, attended_, inner_, out_, attention_out_, logits_, scratch_;
};

}  // namespace rlhf_fast
