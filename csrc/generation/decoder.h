// The step loop: rows wait, are admitted, prefilled, decoded together, sampled, and leave.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "backend.h"
#include "sampler.h"

namespace rlhf_fast {

// One completion to make.
struct Request {
  int64_t prompt;  // which of the prompts
  int64_t limit;   // tokens at most, at least 1
  uint64_t seed;
  uint32_t sample;  // of the seed
};

enum class Finish : int8_t { abort, stop, length };

// Where a request's results go: row i of each, `width` apart. What is not written stays as it is.
struct Output {
  int64_t width;
  int64_t* tokens;
  bool* mask;
  float* logprobs;
  float* sampled_logprobs;
  Finish* finish;  // [requests]; an untouched one must say abort
};

struct Options {
  SamplingOptions sampling;         // its stop ids are set from these:
  std::vector<int32_t> stop_ids;   // in order; what ends a row and may not be drawn before min_tokens
  int64_t max_rows = 64;         // decoded together
  int64_t prefill_tokens = 256;  // of prompts that go through the model in one step, beside those being decoded
  int64_t cache_bytes = 0;       // 0: no bound
};

// What the loop asks of its caller. All may throw, which ends the call.
struct Callbacks {
  // Between pieces of work; true ends the call, and rows that are not finished say abort.
  std::function<bool()> interrupted;
  // After a step, given rows and their new tokens: which of them are to stop. May be empty.
  std::function<std::vector<bool>(const std::vector<int64_t>& rows, const std::vector<int32_t>& tokens)> stopped;
};

struct DecodeStats {
  int64_t steps = 0;
  int64_t prompt_tokens = 0;  // that went through the model: shared ones once, those of evicted rows again
  int64_t evictions = 0;      // rows that gave their pages back for a while
  int64_t peak_cache_bytes = 0;
  int64_t looks = 0;          // at `interrupted`
  bool finite = true;         // false: a log-prob was NaN, which ended the call
};

// Completes all requests. Throws std::invalid_argument when the cache cannot hold a row alone.
DecodeStats decode(Backend& backend, const std::vector<std::vector<int32_t>>& prompts,
                   const std::vector<Request>& requests, const Options& options, const Callbacks& callbacks,
                   const Output& output);

}  // namespace rlhf_fast
