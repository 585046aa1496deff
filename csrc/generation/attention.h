// Attention over a paged cache: one sequence's queries against its own pages, on plain pointers.
//
// A page holds the keys and values of kPageTokens consecutive positions for every layer and key-value head. Keys lie
// [head_size][kPageTokens], so that the scores of a page are sums over the head's components with a position a lane;
// values lie [kPageTokens][value_stride]. Every score and every output is added up in the order of components and
// positions, so that its bits depend neither on the other sequences nor on how many queries are asked at once.
#pragma once

#include <cstdint>

#include "../cpu/isa.h"
#include "linear.h"

namespace rlhf_fast {

constexpr int64_t kPageTokens = 16;

struct CacheLayout {
  WeightType type = WeightType::float32;  // of what is stored
  int64_t layers = 0;
  int64_t heads = 0;  // key-value heads
  int64_t head_size = 0;

  int64_t element() const { return type == WeightType::float32 ? 4 : 2; }
  int64_t value_stride() const { return (head_size + 15) / 16 * 16; }
  int64_t head_bytes() const { return kPageTokens * (head_size + value_stride()) * element(); }
  int64_t page_bytes() const { return layers * heads * head_bytes(); }
  int64_t offset(int64_t layer, int64_t head) const { return (layer * heads + head) * head_bytes(); }
};

// What the queries of one key-value head are asked in one layer.
struct Attention {
  CacheLayout layout;
  int64_t offset;            // of this layer and head in a page
  char* const* pages;        // the sequence's, by position / kPageTokens
  int64_t position;          // of the first token
  int64_t tokens;            // consecutive ones
  int64_t window;            // positions that a query sees, itself included; 0: all
  float scale;
  float cap;                 // scores become cap * tanh(score / cap); 0: as they are
  bool eager;                // in half precision every step is rounded, the probabilities too
  int64_t group;             // query heads of this key-value head
  const float* queries;      // query head h of token t starts at t * query_stride + h * query_head_stride
  int64_t query_stride;
  int64_t query_head_stride;
  float* outputs;            // ... at t * output_stride + h * head_size
  int64_t output_stride;
};

// Floats of scratch that `attend` needs for sequences of up to that many positions.
constexpr int64_t attention_scratch(int64_t positions, int64_t head_size) {
  return 4 * ((positions + kPageTokens - 1) / kPageTokens * kPageTokens + 4 * kPageTokens + head_size + 16);
}

#define RLHF_FAST_DECLARE(isa)                                                                                       \
  namespace isa {                                                                                                    \
  void append(const CacheLayout& layout, char* page_head, int64_t slot, const float* key, const float* value);       \
  void attend(const Attention& attention, float* scratch);                                                           \
  }
// append: writes one position's key and value; page_head is where the layer's head starts in the page.
RLHF_FAST_FOR_EACH_ISA(RLHF_FAST_DECLARE)
#undef RLHF_FAST_DECLARE

}  // namespace rlhf_fast
