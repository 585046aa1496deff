// Rows of logits -> a token each and its log-probs, as csrc/generation/sampler.cpp has them.
//
// Two launches. In the first a warp takes the largest and the sum of exponentials of a chunk of the row, as many at a
// time as the GPU has room for. In the second a block draws a row's token: mostly from what the chunks said, looking at
// one of them, or with filters at those that can hold a token that is left.
//
// Filters and draws are searches by sums (block_search.h): over the tokens ordered by logit for what a filter leaves,
// over their ids for what a uniform number falls on. Exponentials are float32 and sums double, as on the CPU.
#include <algorithm>
#include <cmath>

#include "../generation/philox.h"
#include "block_search.h"
#include "kernels.h"
#include "rows.h"

namespace rlhf_fast::cuda {
namespace {

constexpr int kChunkTokens = 256;  // of one warp
constexpr int kChunkWarps = 8;     // of a block in the first launch
constexpr int kDrawWarps = 16;     // in the second
constexpr int kDrawThreads = 32 * kDrawWarps;
constexpr int kListed = 256;  // candidates of a warp in shared memory
constexpr float kInfinity = INFINITY;
constexpr float kLog2E = 1.44269504f;

// e^(x - largest) for scale = kLog2E; 0 where the CPU's is, NaN for NaN.
__device__ __forceinline__ float exponential(float x, float largest, float scale) {
  const float power = (x - largest) * scale;
  return power < -126.5f ? 0.0f : exp2f(power);
}

// What a row's logits become before a token is drawn.
struct Row {
  int vocabulary;
  const float* logits;
  float penalty;
  const uint64_t* seen;  // null: no penalty
  const int32_t* stop_ids;
  int64_t stop_count;  // 0 from min_tokens on

  __device__ float allowed(int token) const { return allowed(token, logits[token]); }
  __device__ float allowed(int token, float logit) const {
    for (int64_t i = 0; i < stop_count; ++i) {
      if (stop_ids[i] == token) logit = -kInfinity;
    }
    if (seen && (seen[token / 64] >> (token % 64) & 1)) logit = logit > 0 ? logit / penalty : logit * penalty;
    return logit;
  }
};

struct Batch {
  float* logits;
  int vocabulary;
  SamplingOptions options;
  Sampling sampling;
  float scale;     // of logits in powers of 2: log2(e) / temperature
  bool processed;  // min_tokens or the penalty acts

  __device__ Row row(int64_t i) const {
    const bool masked = sampling.position[i] < options.min_tokens;
    const bool penalised = options.repetition_penalty != 1 && sampling.seen;
    return {vocabulary,       logits + i * vocabulary,     float(options.repetition_penalty),
            penalised ? sampling.seen[i] : nullptr, options.stop_ids, masked ? options.stop_count : 0};
  }
};

// Of each chunk the largest logit and the sum of e^((logit - it) / temperature), [rows, chunks].
struct Chunks {
  double* sums;
  float* largest;
  int count;  // of a row

  __device__ Chunks row(int64_t i) const { return {sums + i * count, largest + i * count, count}; }
};

// A warp's tokens of a chunk: 32 next to each other at a time.
constexpr int kLaneTokens = kChunkTokens / 32;

__device__ __forceinline__ void summarise(const float (&x)[kLaneTokens], float scale, const Chunks& chunks, int chunk) {
  float largest = -kInfinity;
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) largest = fmaxf(largest, x[i]);
  largest = warp_max(largest);
  const float finite = fmaxf(largest, -3.4e38f);  // what all -inf differ from by -inf
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) sum += exponential(x[i], finite, scale);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) {
    chunks.largest[chunk] = largest;
    chunks.sums[chunk] = sum;
  }
}

__global__ __launch_bounds__(32 * kChunkWarps) void summarise_kernel(Batch batch, float logit_scale, float logit_cap,
                                                                     Chunks full, Chunks allowed) {
  const int chunk = blockIdx.x * kChunkWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t index = blockIdx.y;
  if (chunk >= full.count) return;
  const Row row = batch.row(index);
  float* const logits = batch.logits + index * batch.vocabulary;
  float x[kLaneTokens];
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) {
    const int token = chunk * kChunkTokens + 32 * i + lane;
    x[i] = token < row.vocabulary ? logits[token] : -kInfinity;
  }
  if (logit_scale != 1 || logit_cap > 0) {
    const float factor = logit_cap > 0 ? logit_scale / logit_cap : logit_scale;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      const int token = chunk * kChunkTokens + 32 * i + lane;
      if (token >= row.vocabulary) continue;
      x[i] = logit_cap > 0 ? logit_cap * tanhf(x[i] * factor) : x[i] * factor;
      logits[token] = x[i];
    }
  }
  summarise(x, batch.scale, full.row(index), chunk);
  if (!batch.processed) return;
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) {
    const int token = chunk * kChunkTokens + 32 * i + lane;
    if (token < row.vocabulary) x[i] = row.allowed(token, x[i]);
  }
  summarise(x, batch.scale, allowed.row(index), chunk);
}

// A candidate that the filters may leave.
struct Candidate {
  int token;
  float logit;  // divided by the temperature
};

struct Shared {
  BlockSums<kDrawThreads> sums;
  float largest[kDrawWarps];
  Candidate candidates[kDrawWarps][kListed];
  int counts[kDrawWarps];  // of candidates, also of those that the list has no room for
};

// Keys that rise where logits fall.
__device__ __forceinline__ uint32_t falling(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 is 0
  return bits >> 31 ? bits : ~bits ^ 0x80000000;
}

// Where a uniform number falls in a cumulative distribution: below its end whatever the rounding.
__device__ __forceinline__ double target(double uniform, double total) {
  return fmin(uniform * total, nextafter(total, 0.0));
}

// softmax(logits / temperature) of a row, from its chunks.
struct Softmax {
  Chunks chunks;
  float largest;
  float scale;
  double total;  // of e^((logit - largest) / temperature)

  __device__ double weight(int chunk) const {
    return chunks.sums[chunk] * double(exponential(chunks.largest[chunk], largest, scale));
  }
  __device__ double weight(float logit) const { return exponential(logit, largest, scale); }
  __device__ bool finite() const { return total > 0 && total < kInfinity; }  // false for NaN
  __device__ double log_prob(float logit, double temperature) const {
    return (double(logit) - largest) / temperature - log(total);
  }
};

// Calls use(chunk) for the thread's share of them.
template <typename Use>
__device__ __forceinline__ void for_each_chunk(const Chunks& chunks, Use use) {
  for (int chunk = threadIdx.x; chunk < chunks.count; chunk += kDrawThreads) use(chunk);
}

__device__ __forceinline__ Softmax softmax(const Chunks& chunks, float scale, Shared& shared) {
  float largest = -kInfinity;
  for_each_chunk(chunks, [&](int chunk) { largest = fmaxf(largest, chunks.largest[chunk]); });
  largest = warp_max(largest);
  if (threadIdx.x % 32 == 0) shared.largest[threadIdx.x / 32] = largest;
  __syncthreads();
  for (const float other : shared.largest) largest = fmaxf(largest, other);
  Softmax row{chunks, largest, scale, 0};
  row.total = block_total(
      [&](auto use) { for_each_chunk(chunks, [&](int chunk) { use(chunk, row.weight(chunk)); }); }, shared.sums);
  return row;
}

// The first token up to which the weights are more than `goal` together: first its chunk, then the token in it.
template <typename ChunkWeight, typename TokenWeight>
__device__ __forceinline__ int draw(const Row& row, const Chunks& chunks, double goal, ChunkWeight chunk_weight,
                                    TokenWeight token_weight, Shared& shared) {
  const auto each_chunk = [&](auto use) {
    for_each_chunk(chunks, [&](int chunk) { use(chunk, chunk_weight(chunk)); });
  };
  const int chunk = first_beyond(0, chunks.count - 1, goal, each_chunk, shared.sums);
  const double before = block_total(
      [&](auto use) { each_chunk([&](int other, double weight) { use(other, other < chunk ? weight : 0.0); }); },
      shared.sums);
  const int first = chunk * kChunkTokens, end = min(first + kChunkTokens, row.vocabulary);
  const auto each_token = [&](auto use) {
    for (int token = first + threadIdx.x; token < end; token += kDrawThreads) use(token, token_weight(token));
  };
  // The tokens' sum may be a little below the chunk's.
  const double within = block_total(each_token, shared.sums);
  return first_beyond(first, end - 1, fmin(goal - before, nextafter(within, 0.0)), each_token, shared.sums);
}

// The tokens whose logit is at least some floor, given as a key.
struct Candidates {
  const Row& row;
  const Chunks& chunks;
  float temperature;
  uint32_t floor;
  Shared& shared;
  bool listed;

  // Calls use(token, logit, whether it is a candidate) for the lane's tokens of the warp's chunks, with all lanes of
  // the warp together.
  template <typename Use>
  __device__ __forceinline__ void scan(Use use) const {
    for (int chunk = threadIdx.x / 32; chunk < chunks.count; chunk += kDrawWarps) {
      if (falling(chunks.largest[chunk] / temperature) > floor) continue;
      for (int i = 0; i < kLaneTokens; ++i) {
        const int token = chunk * kChunkTokens + 32 * i + threadIdx.x % 32;
        const float logit = token < row.vocabulary ? row.allowed(token) / temperature : -kInfinity;
        use(token, logit, token < row.vocabulary && falling(logit) <= floor);
      }
    }
  }

  // Lists them, if there is room for those of each warp.
  __device__ __forceinline__ void list() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int count = 0;
    scan([&](int token, float logit, bool there) {
      const uint32_t mask = __ballot_sync(0xffffffffu, there);
      const int place = count + __popc(mask & ((1u << lane) - 1));
      if (there && place < kListed) shared.candidates[warp][place] = {token, logit};
      count += __popc(mask);
    });
    if (lane == 0) shared.counts[warp] = count;
    __syncthreads();
    listed = true;
    for (const int other : shared.counts) listed = listed && other <= kListed;
  }

  // Calls use(token, logit) for the thread's share of them.
  template <typename Use>
  __device__ __forceinline__ void for_each(Use use) const {
    if (listed) {
      const int warp = threadIdx.x / 32;
      for (int i = threadIdx.x % 32; i < shared.counts[warp]; i += 32) {
        const Candidate candidate = shared.candidates[warp][i];
        use(candidate.token, candidate.logit);
      }
    } else {
      scan([&](int token, float logit, bool there) {
        if (there) use(token, logit);
      });
    }
  }
};

struct Drawn {
  int token;
  double total;  // of the weights of what it was drawn from
};

__device__ __forceinline__ Drawn draw_filtered(const Row& row, const Softmax& softmax, const SamplingOptions& options,
                                               double uniform, Shared& shared) {
  const float temperature = float(options.temperature), largest = softmax.largest / temperature;
  const uint32_t first = falling(largest);
  uint32_t floor = falling(-kInfinity);
  if (options.min_p > 0) floor = falling(largest + float(log(options.min_p)));
  if (options.top_k > 0 && options.top_k <= softmax.chunks.count) {
    // The chunks that hold the k largest maxima hold k logits from the k-th of them on.
    const auto each_chunk = [&](auto use) {
      for_each_chunk(softmax.chunks,
                     [&](int chunk) { use(falling(softmax.chunks.largest[chunk] / temperature), 1.0); });
    };
    floor = min(floor, first_beyond(first, falling(-kInfinity), options.top_k - 0.5, each_chunk, shared.sums));
  }
  const bool top_p_alone = options.min_p == 0 && options.top_k == 0;
  if (top_p_alone) {
    // All tokens below this one have less than 1 - top_p together; the margin is more than rounding takes.
    const double rest = (1 - options.top_p) * softmax.total / row.vocabulary;
    floor = falling(largest + float(log(rest) - 1e-3));
  }

  Candidates candidates{row, softmax.chunks, temperature, floor, shared, false};
  candidates.list();
  const auto weight = [&](float logit) { return double(exponential(logit, largest, kLog2E)); };
  const auto by_logit = [&](auto use) {
    candidates.for_each([&](int, float logit) { use(falling(logit), weight(logit)); });
  };

  // Left are the tokens before the key `last`, and of those that have it the ones up to last_token.
  uint32_t last = floor;
  int last_token = row.vocabulary - 1;
  if (options.top_k > 0) {
    last = first_beyond(
        first, last, options.top_k - 0.5,
        [&](auto use) { candidates.for_each([&](int, float logit) { use(falling(logit), 1.0); }); }, shared.sums);
  }
  if (options.top_p < 1) {
    const auto up_to_last = [&](auto use) {
      by_logit([&](uint32_t key, double weight) { use(key, key <= last ? weight : 0.0); });
    };
    const double total = top_p_alone ? softmax.total : block_total(up_to_last, shared.sums);
    const double goal = nextafter(options.top_p * total, 0.0);  // as many as reach top_p
    last = first_beyond(first, last, goal, by_logit, shared.sums);
    const double before = block_total(
        [&](auto use) {
          by_logit([&](uint32_t key, double weight) { use(key, key < last ? weight : 0.0); });
        },
        shared.sums);
    last_token = first_beyond(
        0, last_token, goal - before,
        [&](auto use) {
          candidates.for_each([&](int token, float logit) {
            if (falling(logit) == last) use(token, weight(logit));
          });
        },
        shared.sums);
  }

  const auto left = [&](auto use) {
    candidates.for_each([&](int token, float logit) {
      const uint32_t key = falling(logit);
      if (key < last || (key == last && token <= last_token)) use(token, weight(logit));
    });
  };
  const double total = block_total(left, shared.sums);
  const int token = first_beyond(0, row.vocabulary - 1, target(uniform, total), left, shared.sums);
  return {token, total};
}

__global__ __launch_bounds__(kDrawThreads) void draw_kernel(Batch batch, Chunks full_chunks, Chunks allowed_chunks) {
  __shared__ Shared shared;
  const int64_t index = blockIdx.x;
  const SamplingOptions& options = batch.options;
  const Sampling& sampling = batch.sampling;
  const Row row = batch.row(index);
  const bool greedy = options.temperature == 0;
  const double temperature = greedy ? 1 : options.temperature;
  const bool filtered = !greedy && (options.min_p > 0 || options.top_k > 0 || options.top_p < 1);

  const Softmax full = softmax(full_chunks.row(index), batch.scale, shared);
  const Softmax allowed = batch.processed ? softmax(allowed_chunks.row(index), batch.scale, shared) : full;
  const bool overflow = filtered && !(fabsf(allowed.largest / float(temperature)) < kInfinity);
  const bool valid = full.finite() && allowed.finite() && !overflow;

  // All threads of the block agree.
  Drawn drawn{0, allowed.total};
  const double number = uniform(sampling.seed[index], sampling.sample[index], sampling.position[index]);
  if (valid && filtered) {
    drawn = draw_filtered(row, allowed, options, number, shared);
  } else if (valid) {
    const double goal = greedy ? 0 : target(number, allowed.total);
    drawn.token = draw(
        row, allowed.chunks, goal,
        [&](int chunk) {
          return greedy ? double(allowed.chunks.largest[chunk] == allowed.largest) : allowed.weight(chunk);
        },
        [&](int token) {
          const float logit = row.allowed(token);
          return greedy ? double(logit == allowed.largest) : allowed.weight(logit);
        },
        shared);
  }

  if (threadIdx.x > 0) return;
  const float nan = kInfinity - kInfinity;
  float logprob = nan, sampled_logprob = nan;
  if (valid) {
    const float logit = row.allowed(drawn.token), divisor = float(temperature);
    logprob = float(full.log_prob(row.logits[drawn.token], temperature));
    sampled_logprob = filtered ? float(double(logit / divisor) - allowed.largest / divisor - log(drawn.total))
                               : float(allowed.log_prob(logit, temperature));
    if (sampling.seen && sampling.seen[index]) {
      sampling.seen[index][drawn.token / 64] |= uint64_t(1) << (drawn.token % 64);
    }
  }
  sampling.token[index] = drawn.token;
  sampling.logprob[index] = logprob;
  sampling.sampled_logprob[index] = sampled_logprob;
}

}  // namespace

#if !defined(__CUDACC_RTC__)  // the host half
namespace {

// The workspace: of the logits as they are, then of the allowed ones.
struct Workspace {
  Chunks full, allowed;

  Workspace(void* memory, int64_t rows, int64_t vocabulary) {
    const int64_t count = quotient_up(vocabulary, kChunkTokens), size = rows * count;
    auto* const sums = static_cast<double*>(memory);
    auto* const largest = reinterpret_cast<float*>(sums + 2 * size);
    full = {sums, largest, int(count)};
    allowed = {sums + size, largest + size, int(count)};
  }
  static int64_t bytes(int64_t rows, int64_t vocabulary) {
    return 2 * rows * quotient_up(vocabulary, kChunkTokens) * int64_t(sizeof(double) + sizeof(float));
  }
};

}  // namespace

int64_t sample_workspace(int64_t rows, int64_t vocabulary) { return Workspace::bytes(rows, vocabulary); }

void sample(float* logits, int64_t rows, int64_t vocabulary, float logit_scale, float logit_cap,
            const SamplingOptions& options, const Sampling& sampling, void* workspace, Stream stream) {
  Batch batch{logits, int(vocabulary), options, sampling, 0, false};
  const double temperature = options.temperature == 0 ? 1 : options.temperature;
  batch.scale = float(1.44269504088896340736 / temperature);
  batch.processed = options.repetition_penalty != 1 || (options.min_tokens > 0 && options.stop_count > 0);
  if (options.top_k < 0 || options.top_k >= vocabulary) batch.options.top_k = 0;
  const Workspace memory(workspace, rows, vocabulary);
  launch<summarise_kernel>(dim3(quotient_up(memory.full.count, kChunkWarps), rows), dim3(32 * kChunkWarps), 0, stream,
                           batch, logit_scale, logit_cap, memory.full, memory.allowed);
  launch<draw_kernel>(dim3(rows), dim3(kDrawThreads), 0, stream, batch, memory.full, memory.allowed);
}

#endif

}  // namespace rlhf_fast::cuda
