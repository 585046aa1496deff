// One pass of the model over tokens of any number of sequences, prompts and answers alike.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "backend.h"
#include "model.h"

namespace rlhf_fast {

// Multiply-adds of products and attention from one look at `interrupted` to the next, at most: some hundredths of a
// second, whatever the model's size and the prompt's length.
constexpr int64_t kBetweenLooks = int64_t(1) << 28;

class Forward {
 public:
  explicit Forward(const Model& model) : model_(model), layout_(model.cache_layout()) {}

  // As Backend::run, but throws Interrupted. `interrupted` must live as long as logits are asked for.
  void run(const std::vector<Span>& spans, const std::function<bool()>& interrupted);

  // Logits [tokens.size(), vocabulary] of some of the pass's tokens, counted over all spans. Throws Interrupted.
  const float* logits(const std::vector<int64_t>& tokens);

 private:
  void embed(const std::vector<Span>& spans);
  void attention(const Layer& layer, int64_t index, const std::vector<Span>& spans);
  void mlp(const Layer& layer);
  void look(int64_t work);
  void product(std::span<const Linear> layers, const float* x, int64_t rows, float* y);
  void project(std::span<const Linear> layers, const float* x, int64_t rows, float* y);
  void norm(const Norm& norm, std::vector<float>& x, std::vector<float>& y);
  void add(const Norm& norm, std::vector<float>& x, std::vector<float>& y);

  const Model& model_;
  const CacheLayout layout_;
  const std::function<bool()>* interrupted_ = nullptr;
  int64_t work_ = 0;  // multiply-adds since the last look
  int64_t tokens_ = 0, positions_ = 0;
  std::vector<float> hidden_, normed_, projected_, attended_, inner_, out_, attention_out_, logits_, scratch_;
  std::vector<uint32_t> pairs_;  // linear()'s scratch
};

}  // namespace rlhf_fast
