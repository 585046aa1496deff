// One row of logits -> a token and its log-probs. rlhf_fast/generation/sampler.py is the definition: from the same
// logits this draws the same token, except where rounding moves the border between two.
//
// min_tokens, penalty, temperature, min_p, top_k and top_p act in this order; then the inverse of the cumulative
// distribution in vocabulary order, its sums in double, at the uniform number of (seed, sample, position).
#pragma once

#include <cstdint>

namespace rlhf_fast {

struct SamplingOptions {
  double temperature = 1;  // 0: the likeliest token (of equal ones the lowest id), with log-probs at temperature 1
  double top_p = 1;
  double min_p = 0;
  double repetition_penalty = 1;
  int64_t top_k = 0;
  int64_t min_tokens = 0;
  const int32_t* stop_ids = nullptr;  // what may not be drawn before min_tokens
  int64_t stop_count = 0;
};

// Which uniform number a token is drawn with.
struct Place {
  uint64_t seed;
  uint32_t sample;    // the completion's number among those of its prompt
  uint32_t position;  // the token's number in the completion
};

// Both log-probs are NaN where no token can be drawn: NaN or infinite logits, or nothing left of them.
struct Sampled {
  int32_t token;
  float logprob;          // in softmax(logits / temperature)
  float sampled_logprob;  // in what it was drawn from; greedy: after min_tokens and penalty, at temperature 1
};

// A set of token ids, one bit each in ceil(vocabulary / 64) words.
inline void insert(uint64_t* set, int32_t token) { set[token / 64] |= uint64_t(1) << (token % 64); }

// `seen`: the tokens of the prompt and those drawn so far, for the penalty; may be null without one. Any thread may
// call it; the memory that it needs each thread keeps.
Sampled sample(const float* logits, int64_t vocabulary, const SamplingOptions& options, Place place,
               const uint64_t* seen);

}  // namespace rlhf_fast
