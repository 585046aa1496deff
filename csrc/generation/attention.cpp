#include "attention.h"

#include <math.h>

#include "functions.h"

namespace rlhf_fast::RLHF_FAST_ISA {
namespace {

constexpr int64_t kQueries = 4;                        // asked at once: each key and value is loaded once for them
constexpr int64_t kVectors = kPageTokens / kWidth;     // of a page's scores

template <typename T>
void append_as(const CacheLayout& layout, T* keys, int64_t slot, const float* key, const float* value) {
  T* const values = keys + kPageTokens * layout.head_size + slot * layout.value_stride();
  for (int64_t i = 0; i < layout.value_stride(); i += kWidth) {
    float key_part[kWidth] = {}, value_part[kWidth] = {};
    const int64_t count = layout.head_size - i < kWidth ? layout.head_size - i : kWidth;
    for (int64_t j = 0; j < count; ++j) key_part[j] = key[i + j], value_part[j] = value[i + j];
    T rounded[kWidth];
    store(rounded, load(key_part));
    for (int64_t j = 0; j < count; ++j) keys[(i + j) * kPageTokens + slot] = rounded[j];
    store(values + i, load(value_part));
  }
}

// Q queries of one key-value head, with the positions [begin, end) that any of them sees.
struct Block {
  const float* query[kQueries];
  float* output[kQueries];
  int64_t position[kQueries];
  int64_t begin, end;
};

// scores[q][16 p + lane] = query q . key for P pages from the one at `pages`.
template <int Q, int P, typename T>
void score_pages(const Attention& a, const Block& block, char* const* pages, float* scores, int64_t stride) {
  const T* keys[P];
  for (int p = 0; p < P; ++p) keys[p] = reinterpret_cast<const T*>(pages[p] + a.offset);
  Floats sums[Q][P][kVectors];
  for (int q = 0; q < Q; ++q)
    for (int p = 0; p < P; ++p)
      for (int v = 0; v < kVectors; ++v) sums[q][p][v] = splat(0.0f);
  for (int64_t i = 0; i < a.layout.head_size; ++i) {
    Floats component[Q];
    for (int q = 0; q < Q; ++q) component[q] = splat(block.query[q][i]);
    for (int p = 0; p < P; ++p)
      for (int v = 0; v < kVectors; ++v) {
        const Floats key = load(keys[p] + i * kPageTokens + v * kWidth);
        for (int q = 0; q < Q; ++q) sums[q][p][v] = fma(component[q], key, sums[q][p][v]);
      }
  }
  for (int q = 0; q < Q; ++q)
    for (int p = 0; p < P; ++p)
      for (int v = 0; v < kVectors; ++v) store(scores + q * stride + p * kPageTokens + v * kWidth, sums[q][p][v]);
}

// How scores become weights. In half precision a fused kernel, PyTorch's scaled_dot_product_attention, computes them in
// float32 and rounds exp(score - largest) but not the sum of these; eager attention rounds each step and probabilities.
enum class Steps { exact, fused, eager };

// A score, of a query's product with a key.
template <Steps kSteps, typename T>
inline Floats score_of(const Attention& a, Floats product) {
  if constexpr (kSteps == Steps::eager) {
    const Floats score = rounded<T>(mul(rounded<T>(product), splat(a.scale)));
    if (a.cap == 0) return score;
    return rounded<T>(mul(rounded<T>(tanh(rounded<T>(div(score, splat(a.cap))))), splat(a.cap)));
  }
  if (a.cap == 0) return mul(product, splat(a.scale));
  return mul(splat(a.cap), tanh(mul(product, splat(a.scale / a.cap))));
}

// Scores -> exp(score - largest), 0 where the query does not look, or the same over their sum. Returns what the sum of
// values weighted by them is to be multiplied by.
template <Steps kSteps, typename T>
float weigh(const Attention& a, float* scores, int64_t first, int64_t count, int64_t position) {
  const int64_t seen = a.window > 0 && position >= a.window ? position - a.window + 1 : 0;
  Floats largest_score = splat(-HUGE_VALF);
  for (int64_t j = 0; j < count; j += kWidth) store(scores + j, score_of<kSteps, T>(a, load(scores + j)));
  for (int64_t j = first; j < seen; ++j) scores[j - first] = -HUGE_VALF;
  for (int64_t j = position + 1; j < first + count; ++j) scores[j - first] = -HUGE_VALF;
  for (int64_t j = 0; j < count; j += kWidth) largest_score = max(largest_score, load(scores + j));
  const Floats most = splat(largest(largest_score));
  // A page's lanes, added up page by page.
  Floats sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = splat(0.0f);
  for (int64_t j = 0; j < count; j += kPageTokens)
    for (int v = 0; v < kVectors; ++v) {
      const Floats below = sub(load(scores + j + v * kWidth), most);
      const Floats weight = kSteps == Steps::fused ? exp_of_attention(below) : exp_negative(below);
      store(scores + j + v * kWidth, kSteps == Steps::fused ? rounded<T>(weight) : weight);
      sums[v] = add(sums[v], weight);
    }
  for (int v = 1; v < kVectors; ++v) sums[0] = add(sums[0], sums[v]);
  const float total = sum(sums[0]);
  if (kSteps != Steps::eager) return 1.0f / total;
  for (int64_t j = 0; j < count; j += kWidth) store(scores + j, rounded<T>(div(load(scores + j), splat(total))));
  return 1;
}

// out[q][i..] = sum over positions of weight * value, for V vectors of components from i on.
template <int Q, int V, typename T>
void gather_values(const Attention& a, const Block& block, const float* weights, int64_t stride, const float* factor,
                   int64_t i, float* out, int64_t out_stride) {
  const int64_t value_stride = a.layout.value_stride(), first = block.begin / kPageTokens * kPageTokens;
  Floats sums[Q][V];
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < V; ++v) sums[q][v] = splat(0.0f);
  for (int64_t page = block.begin / kPageTokens; page * kPageTokens < block.end; ++page) {
    const int64_t start = page * kPageTokens;
    const int64_t from = block.begin > start ? block.begin - start : 0;
    const int64_t to = block.end - start < kPageTokens ? block.end - start : kPageTokens;
    const T* const values =
        reinterpret_cast<const T*>(a.pages[page] + a.offset) + kPageTokens * a.layout.head_size + i;
    for (int64_t t = from; t < to; ++t) {
      Floats weight[Q];
      for (int q = 0; q < Q; ++q) weight[q] = splat(weights[q * stride + start - first + t]);
      for (int v = 0; v < V; ++v) {
        const Floats value = load(values + t * value_stride + v * kWidth);
        for (int q = 0; q < Q; ++q) sums[q][v] = fma(weight[q], value, sums[q][v]);
      }
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < V; ++v) store(out + q * out_stride + i + v * kWidth, mul(sums[q][v], splat(factor[q])));
}

template <int Q, typename T>
void attend_block(const Attention& a, const Block& block, float* scratch) {
  const int64_t first_page = block.begin / kPageTokens, last_page = (block.end - 1) / kPageTokens;
  const int64_t first = first_page * kPageTokens, count = (last_page - first_page + 1) * kPageTokens;
  const int64_t out_stride = a.layout.value_stride();
  float* const scores = scratch + Q * out_stride;
  constexpr int kPages = kQueries / Q;
  int64_t page = first_page;
  for (; page + kPages <= last_page + 1; page += kPages) {
    score_pages<Q, kPages, T>(a, block, a.pages + page, scores + page * kPageTokens - first, count);
  }
  for (; page <= last_page; ++page) {
    score_pages<Q, 1, T>(a, block, a.pages + page, scores + page * kPageTokens - first, count);
  }
  float factor[Q];
  for (int q = 0; q < Q; ++q) {
    constexpr Steps kHalf = sizeof(T) < sizeof(float) ? Steps::fused : Steps::exact;
    constexpr Steps kEager = sizeof(T) < sizeof(float) ? Steps::eager : Steps::exact;
    const auto weigh_scores = a.eager ? weigh<kEager, T> : weigh<kHalf, T>;
    factor[q] = weigh_scores(a, scores + q * count, first, count, block.position[q]);
  }

  constexpr int kAtOnce = 8 / Q;
  int64_t i = 0;
  for (; i + kAtOnce * kWidth <= out_stride; i += kAtOnce * kWidth) {
    gather_values<Q, kAtOnce, T>(a, block, scores, count, factor, i, scratch, out_stride);
  }
  for (; i < out_stride; i += kWidth) gather_values<Q, 1, T>(a, block, scores, count, factor, i, scratch, out_stride);
  for (int q = 0; q < Q; ++q)
    for (int64_t j = 0; j < a.layout.head_size; ++j) block.output[q][j] = scratch[q * out_stride + j];
}

template <typename T>
void attend_as(const Attention& a, float* scratch) {
  const int64_t queries = a.tokens * a.group;
  for (int64_t next = 0; next < queries; next += kQueries) {
    const int64_t count = queries - next < kQueries ? queries - next : kQueries;
    Block block;
    for (int64_t q = 0; q < count; ++q) {
      const int64_t token = (next + q) / a.group, head = (next + q) % a.group;
      block.query[q] = a.queries + token * a.query_stride + head * a.query_head_stride;
      block.output[q] = a.outputs + token * a.output_stride + head * a.layout.head_size;
      block.position[q] = a.position + token;
    }
    const int64_t earliest = block.position[0];
    block.begin = a.window > 0 && earliest >= a.window ? earliest - a.window + 1 : 0;
    block.end = block.position[count - 1] + 1;
    switch (count) {
      case 1: attend_block<1, T>(a, block, scratch); break;
      case 2: attend_block<2, T>(a, block, scratch); break;
      case 3: attend_block<3, T>(a, block, scratch); break;
      default: attend_block<4, T>(a, block, scratch);
    }
  }
}

}  // namespace

void append(const CacheLayout& layout, char* page_head, int64_t slot, const float* key, const float* value) {
  switch (layout.type) {
    case WeightType::float32: return append_as(layout, reinterpret_cast<float*>(page_head), slot, key, value);
    case WeightType::bfloat16: return append_as(layout, reinterpret_cast<bfloat16*>(page_head), slot, key, value);
    case WeightType::float16: return append_as(layout, reinterpret_cast<float16*>(page_head), slot, key, value);
  }
}

void attend(const Attention& attention, float* scratch) {
  switch (attention.layout.type) {
    case WeightType::float32: return attend_as<float>(attention, scratch);
    case WeightType::bfloat16: return attend_as<bfloat16>(attention, scratch);
    case WeightType::float16: return attend_as<float16>(attention, scratch);
  }
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
