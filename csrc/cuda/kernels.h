// The decoder's CUDA kernels, as its host code sees them: launchers on plain device pointers and a stream.
//
// None of them allocates, waits or copies to the host, so that a CUDA graph can hold any of them. A row's bits depend
// on that row alone, never on the rows beside it, and no sum's order depends on chance. Rows may start anywhere: a
// kernel reads and writes 16 bytes at a time where all rows allow it.
//
// Activations are stored in the model's type and computed in float32, which rounds them where the model's own modules
// do (csrc/generation/layers.h says more). A launch that CUDA refuses is told by last_error().
#pragma once

#include <cstdint>

struct CUstream_st;  // CUDA's: cudaStream_t points to it

namespace rlhf_fast::cuda {

using Stream = CUstream_st*;  // torch.cuda.current_stream().cuda_stream, an integer on the Python side

enum class Type { float32, bfloat16, float16 };  // numbered as WeightType in csrc/generation/linear.h

constexpr int kPageTokens = 16;

// The paged cache: one pool. With page = kPageTokens * head_size elements, page p of layer l and key-value head h has
//   its keys   [kPageTokens, head_size] at pool + (((p * layers + l) * 2 + 0) * heads + h) * page
//   its values [kPageTokens, head_size] at pool + (((p * layers + l) * 2 + 1) * heads + h) * page
struct PagedCache {
  Type type;
  void* pool;
  int64_t layers, heads, head_size;  // key-value heads
};

// Tokens of a pass, on the device; `count` is on the host. Token i belongs to the sequence sequence[i] and stands at
// position[i] in it, in page pages[sequence[i] * max_pages + position[i] / kPageTokens].
//
// position[i] < 0: padding, where a CUDA graph has room for more tokens than there are. Nothing is read or written in
// the cache for it, and its row of an output becomes zeros or some other finite numbers.
struct Tokens {
  const int32_t* sequence;
  const int32_t* position;
  const int32_t* pages;
  int64_t max_pages;
  int64_t count;
};

struct Norm {
  enum class Kind { none, rms, layer };
  Kind kind = Kind::none;
  const float* weight = nullptr;  // [size], or null for ones
  const float* bias = nullptr;    // [size], or null for zeros
  float epsilon = 0;
  bool round_before_weight = false;  // as Llama's RMSNorm does
};

// Rotary positions: the pair (x[i], x[i + size / 2]), or (x[2 i], x[2 i + 1]) when interleaved, turns by the angle i.
// A head's components from `size` on stay.
struct Rotary {
  const float* cos = nullptr;  // [positions, size / 2], or null: no rotation
  const float* sin = nullptr;
  int64_t size = 0;
  bool interleaved = false;
};

// Where a head's query, key and value begin in a row of projections, in elements.
struct Heads {
  int64_t query_heads = 0, key_value_heads = 0, size = 0;
  int64_t queries = 0, keys = 0, values = 0;
  int64_t query_stride = 0, key_value_stride = 0;  // from one head to the next
};

// x[i] = scale * table[ids[i]] (+ positions[position[i] + position_offset]), rows of `size`; all of the type given.
// `positions` null: no such term. `ids` on the device; where the token is padding its id is not looked at.
void embed(Type type, const void* table, int64_t row_stride, float scale, const int32_t* ids, const Tokens& tokens,
           const void* positions, int64_t position_stride, int64_t position_offset, void* x, int64_t size,
           Stream stream);

// residual += residual_scale * out_norm(x), then y = norm(residual); rows of `size`. x null: the residual stays. y
// null: it is not computed. y may be x.
void add_norm(Type type, const Norm& out_norm, const void* x, float residual_scale, void* residual, const Norm& norm,
              void* y, int64_t rows, int64_t size, Stream stream);

// Prepares the projections [tokens, row] for attention, in place: queries and keys are normed, rotated to their
// positions, and queries scaled. Keys and values go to the cache. The projections are of the cache's type.
void rope_append(const PagedCache& cache, int64_t layer, const Heads& heads, const Norm& query_norm,
                 const Norm& key_norm, const Rotary& rotary, float query_scale, const Tokens& tokens, void* projected,
                 int64_t row, Stream stream);

// Bytes of scratch that `attention` needs for that many tokens of sequences no longer than max_positions.
int64_t attention_workspace(const Heads& heads, int64_t tokens, int64_t max_positions);

// out [tokens, query_heads * size]: each token's queries against its sequence's positions up to its own, of these the
// last `window` (0: all). Scores become cap * tanh(scale * score / cap), or scale * score where cap is 0. max_positions
// bounds every position + 1; `workspace` is 16-byte aligned. Throws std::invalid_argument for heads of more than 2048
// bytes.
void attention(const PagedCache& cache, int64_t layer, const Heads& heads, float scale, float cap, int64_t window,
               const Tokens& tokens, const void* projected, int64_t row, void* out, void* workspace,
               int64_t max_positions, Stream stream);

enum class Activation { relu, silu, gelu, gelu_tanh, gelu_new };  // numbered as in csrc/generation/layers.h

// inner[r, i] = activation(x[r, i]) * x[r, size + i], or activation(x[r, i]) when not gated. Rows of x are x_row
// elements apart, those of inner `size`.
void activate(Type type, Activation activation, bool gated, const void* x, int64_t x_row, void* inner, int64_t rows,
              int64_t size, Stream stream);

// Rows that a product takes; more are a matrix product's work, and std::invalid_argument here.
constexpr int kMaxRows = 16;

// A layer's weights where they lie.
struct Linear {
  const void* weight;  // [out, in], or [in, out] when transposed, as GPT-2's Conv1D keeps it
  Type type;           // of weight, bias and x
  int64_t out, in;
  int64_t row_stride;  // from one row of `weight` to the next, in elements
  bool transposed;
  const void* bias;  // [out], or null
};

// Bytes of scratch that the product needs; 16-byte aligned, and zeros before its first use. What a launch leaves there
// is fit for the next one, whatever its layer: all products of a stream can share the largest.
int64_t linear_workspace(const Linear& layer);

// y[r, o] = sum_i x[r, i] weight[o, i] + bias[o] for 1 to kMaxRows rows, summed in float32 and rounded once, to
// out_type.
void linear(const Linear& layer, const void* x, int64_t rows, int64_t x_row, Type out_type, void* y, int64_t y_row,
            void* workspace, Stream stream);

// The same for up to four layers of the same x and type, all transposed or none, with their outputs side by side in a
// row of y. The workspace has the bytes of all together.
void linear_many(const Linear* layers, int count, const void* x, int64_t rows, int64_t x_row, Type out_type, void* y,
                 int64_t y_row, void* workspace, Stream stream);

// inner = activation(gate(x)) * value(x) for 1 to kMaxRows rows, both weights read once. Both layers have one shape and
// type and are not transposed.
void gated_mlp_in(const Linear& gate, const Linear& value, Activation activation, const void* x, int64_t rows,
                  int64_t x_row, void* inner, int64_t inner_row, Stream stream);

// As csrc/generation/sampler.h has them, with stop_ids on the device.
struct SamplingOptions {
  double temperature, top_p, min_p, repetition_penalty;
  int64_t top_k, min_tokens;
  const int32_t* stop_ids;
  int64_t stop_count;
};

// Arrays on the device with an element for each row.
struct Sampling {
  // Which uniform number a token is drawn with (csrc/generation/sampler.h: Place).
  const uint64_t* seed;
  const uint32_t* sample;
  const uint32_t* position;
  uint64_t* const* seen;  // bit sets of the tokens seen so far, which the drawn one joins; null: no penalty
  int32_t* token;
  float* logprob;  // both NaN where no token can be drawn
  float* sampled_logprob;
};

int64_t sample_workspace(int64_t rows, int64_t vocabulary);

// logits [rows, vocabulary] become logit_cap * tanh(logit_scale * logits / logit_cap), or logit_scale * logits where
// logit_cap is 0; then each row gives a token as csrc/generation/sampler.h defines it, with the same random numbers:
// the same token from the same logits, except where rounding moves the border between two.
void sample(float* logits, int64_t rows, int64_t vocabulary, float logit_scale, float logit_cap,
            const SamplingOptions& options, const Sampling& sampling, void* workspace, Stream stream);

// What the last refused launch was told, or null when all were accepted.
const char* last_error();

}  // namespace rlhf_fast::cuda
