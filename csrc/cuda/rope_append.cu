#include "device.h"
#include "kernels.h"
#include "paged_cache.h"
#include "rows.h"

namespace rlhf_fast::cuda {
namespace {

// A warp prepares one head of one token: few enough heads a block that a batch of one spreads over a dozen SMs.
constexpr int kWarp = 32;
constexpr int kWarps = 4;

template <typename T, bool kAligned>
__device__ __forceinline__ void load_head(const T* from, int64_t size, float* head) {
  for (int64_t i = threadIdx.x % kWarp * kChunk<T>; i < size; i += kWarp * kChunk<T>) {
    const Vector<T> chunk = load_chunk<kAligned>(from, i, size);
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) {
      if (i + j < size) head[i + j] = to_float(chunk.values[j]);
    }
  }
}

template <typename T, bool kAligned>
__device__ __forceinline__ void store_head(const float* head, int64_t size, T* to) {
  for (int64_t i = threadIdx.x % kWarp * kChunk<T>; i < size; i += kWarp * kChunk<T>) {
    Vector<T> chunk;
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) chunk.values[j] = from_float<T>(i + j < size ? head[i + j] : 0.0f);
    store_chunk<kAligned>(to, i, size, chunk);
  }
}

// head = norm(head); each lane reads and writes components of its own.
template <typename T>
__device__ __forceinline__ void normalise(const Norm& norm, float* head, int64_t size) {
  const int64_t lane = threadIdx.x % kWarp;
  float mean = 0;
  if (norm.kind == Norm::Kind::layer) {
    for (int64_t i = lane; i < size; i += kWarp) mean += head[i];
    mean = warp_sum(mean) / float(size);
  }
  float square = 0;
  for (int64_t i = lane; i < size; i += kWarp) square += (head[i] - mean) * (head[i] - mean);
  square = warp_sum(square);
  const float factor = 1.0f / sqrtf(square / float(size) + norm.epsilon);
  for (int64_t i = lane; i < size; i += kWarp) {
    float scaled = (head[i] - mean) * factor;
    if (norm.round_before_weight) scaled = rounded<T>(scaled);
    if (norm.weight) scaled *= norm.weight[i];
    if (norm.bias) scaled += norm.bias[i];
    head[i] = rounded<T>(scaled);
  }
}

// Turns the head's pairs by their angles; each lane reads and writes pairs of its own. Rounded where the models round:
// each product and sum or, with interleaved pairs (Cohere), the result.
template <typename T>
__device__ __forceinline__ void rotate(const Rotary& rotary, int64_t position, float* head) {
  const int64_t half = rotary.size / 2;
  const float *const cos = rotary.cos + position * half, *const sin = rotary.sin + position * half;
  for (int64_t i = threadIdx.x % kWarp; i < half; i += kWarp) {
    float& first = head[rotary.interleaved ? 2 * i : i];
    float& second = head[rotary.interleaved ? 2 * i + 1 : i + half];
    const float a = first, b = second;
    if (rotary.interleaved) {
      first = rounded<T>(a * cos[i] - b * sin[i]);
      second = rounded<T>(b * cos[i] + a * sin[i]);
    } else {
      first = rounded<T>(rounded<T>(a * cos[i]) - rounded<T>(b * sin[i]));
      second = rounded<T>(rounded<T>(b * cos[i]) + rounded<T>(a * sin[i]));
    }
  }
}

// Asks for what a row of float32 numbers will be read from, while something else is on its way.
__device__ __forceinline__ void prefetch_row(const float* row, int64_t size) {
  constexpr int64_t kSector = 32 / sizeof(float);
  if (!row) return;
  for (int64_t i = threadIdx.x % kWarp * kSector; i < size; i += kWarp * kSector) prefetch(row + i);
}

// A head of queries or keys in shared memory, made what attention takes. `query_scale` 1: not scaled.
template <typename T>
__device__ __forceinline__ void prepare(const Norm& norm, const Rotary& rotary, int64_t position, float query_scale,
                                        float* head, int64_t size) {
  if (norm.kind != Norm::Kind::none) {
    normalise<T>(norm, head, size);
    __syncwarp();
  }
  if (rotary.cos) {
    rotate<T>(rotary, position, head);
    __syncwarp();
  }
  if (query_scale != 1) {
    for (int64_t i = threadIdx.x % kWarp; i < size; i += kWarp) head[i] *= query_scale;
    __syncwarp();
  }
}

// Block (token, some of its heads: queries first, then keys, then values). A warp works for itself. Eight blocks an SM:
// for more of them ptxas would keep to 40 registers and spill on sm_100.
template <typename T, bool kAligned>
__global__ __launch_bounds__(kWarps* kWarp, 8) void rope_append_kernel(PagedCache cache, int64_t layer, Heads heads,
                                                                       Norm query_norm, Norm key_norm, Rotary rotary,
                                                                       float query_scale, Tokens tokens, T* projected,
                                                                       int64_t row) {
  DYNAMIC_SHARED(float, shared);
  const int64_t warp = threadIdx.x / kWarp, token = blockIdx.x, number = int64_t(blockIdx.y) * kWarps + warp;
  const int64_t queries = heads.query_heads, others = heads.key_value_heads, size = heads.size;
  const int64_t position = tokens.position[token];
  if (position < 0 || number >= queries + 2 * others) return;

  const bool is_query = number < queries, is_value = number >= queries + others;
  const int64_t index = is_query ? number : (number - queries) % others;
  T* const part = projected + token * row + (is_query ? heads.queries + index * heads.query_stride
                                             : (is_value ? heads.values : heads.keys) + index * heads.key_value_stride);
  T* cached = nullptr;
  if (!is_query) {
    const int64_t page = pages_of(tokens, token)[position / kPageTokens];
    cached = static_cast<T*>(cache.pool) + keys_of(cache, page, layer, index) + position % kPageTokens * size;
    if (is_value) cached += values_behind_keys(cache);
  }
  float* const head = shared + warp * size;
  const Norm norm = is_query ? query_norm : key_norm;
  prefetch_row(norm.weight, size);
  if (rotary.cos) {
    prefetch_row(rotary.cos + position * (rotary.size / 2), rotary.size / 2);
    prefetch_row(rotary.sin + position * (rotary.size / 2), rotary.size / 2);
  }
  load_head<T, kAligned>(part, size, head);
  if (!is_value) {
    __syncwarp();
    prepare<T>(norm, rotary, position, is_query ? query_scale : 1.0f, head, size);
    store_head<T, kAligned>(head, size, part);
  }
  if (cached) store_head<T, kAligned>(head, size, cached);
}

}  // namespace

#if !defined(__CUDACC_RTC__)  // the host half

void rope_append(const PagedCache& cache, int64_t layer, const Heads& heads, const Norm& query_norm,
                 const Norm& key_norm, const Rotary& rotary, float query_scale, const Tokens& tokens, void* projected,
                 int64_t row, Stream stream) {
  if (tokens.count == 0) return;
  with_type(cache.type, [&](auto element) {
    using T = decltype(element);
    const bool aligned = is_aligned<T>(cache.pool, heads.size) &&
                         is_aligned<T>(projected, row, heads.queries, heads.keys, heads.values, heads.query_stride,
                                       heads.key_value_stride);
    with_flag(aligned, [&](auto flag) {
      const dim3 grid(tokens.count, quotient_up(heads.query_heads + 2 * heads.key_value_heads, kWarps));
      launch<rope_append_kernel<T, flag.value>>(grid, dim3(kWarps * kWarp), kWarps * heads.size * sizeof(float), stream,
                                                cache, layer, heads, query_norm, key_norm, rotary, query_scale, tokens,
                                                static_cast<T*>(projected), row);
    });
  });
}

#endif

}  // namespace rlhf_fast::cuda
