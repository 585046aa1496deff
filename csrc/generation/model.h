// A decoder-only transformer as the decoder sees it: where its weights lie and what each block does with them.
//
// One description for all families: a part that a family lacks is off. With x a token's activations,
//   x = scale * embedding[id] (+ positions[position])
//   each block: a = out_norm(attention(norm(x))), m = out_norm(mlp(norm(x + a))), x = x + a + m; in a parallel block
//   the MLP's norm acts on x instead of x + a
//   logits = cap(scale * head(final_norm(x)))
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "layers.h"
#include "linear.h"

namespace rlhf_fast {

struct Layer {
  Norm attention_norm, attention_out_norm, mlp_norm, mlp_out_norm;
  Norm query_norm, key_norm;         // of each head
  std::vector<Linear> attention_in;  // queries, keys and values, side by side in one row
  Linear attention_out{};
  std::vector<Linear> mlp_in;        // gate and value side by side, or one of them alone
  Linear mlp_out{};
  Rotary rotary;
  float query_scale = 1;  // of queries, before they meet a key
  float attention_scale = 1;
  int64_t window = 0;  // positions that a query sees, itself included; 0: all
};

// Where a head's query, key and value begin in the row of attention_in.
struct Heads {
  int64_t query_heads = 0, key_value_heads = 0, size = 0;
  int64_t queries = 0, keys = 0, values = 0;
  int64_t query_stride = 0, key_value_stride = 0;  // from one head to the next
};

struct Model {
  int64_t hidden = 0, vocabulary = 0;
  Embedding embedding;
  std::vector<Linear> embedding_out;  // from embeddings of another size to hidden; empty: they have it
  Embedding positions;          // learned ones; weight null: none
  int64_t position_offset = 0;  // of their first row
  Heads heads;
  std::vector<Layer> layers;
  Activation activation = Activation::silu;
  bool gated = true;     // activation(gate) * value instead of activation(value)
  bool parallel = false;
  bool branches_first = false;  // x + (a + m) in a parallel block instead of (x + a) + m
  float residual_scale = 1;
  float attention_cap = 0;
  bool eager = false;  // attention is a module's own products and softmax instead of a fused kernel
  Norm final_norm;
  std::vector<Linear> hidden_out;  // from hidden to the head's size; empty: it has it
  Linear head{};
  float logit_scale = 1, logit_cap = 0;
  WeightType type = WeightType::float32;  // what it computes in, and of its cache

  CacheLayout cache_layout() const {
    return {type, int64_t(layers.size()), heads.key_value_heads, heads.size};
  }
};

}  // namespace rlhf_fast
