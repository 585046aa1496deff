// Decode attention over the paged cache: few queries a sequence, every key and value read once, so that the memory's
// speed is all that counts. A sequence's positions are split over blocks, or a batch of one would leave most SMs idle;
// a second kernel puts the splits together (Dao et al. 2023, Flash-Decoding).
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "device.h"
#include "kernels.h"
#include "paged_cache.h"
#include "rows.h"

namespace rlhf_fast::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

// Positions that a block takes at a time: 64 KiB of keys and values for heads of 128 halves. With 8 key-value heads
// 4096 positions are 256 blocks, two for each SM of an H100.
constexpr int kTile = 128;
constexpr int kTilePages = kTile / kPageTokens;

// Splits of a sequence at most: a longer one's have more tiles, so that what the second kernel reads stays small.
constexpr int kMostSplits = 64;

// Lanes that share a key: their chunks, side by side, are whole sectors of memory, and a score takes two shuffles. Each
// thread has four keys at a time, so that a block has 8 KiB of keys on their way besides its 32 KiB of values, which it
// asks for before; an H100 wants 40 KiB an SM.
constexpr int kKeyLanes = 4;
constexpr int kKeysAtOnce = kThreads / kKeyLanes;
constexpr int kKeys = kTile / kKeysAtOnce;

// Values that a thread has under way at a time.
constexpr int kValues = 4;

// The positions that a token sees, [first, end), and their splits: of these positions alone, whatever the batch.
struct Splits {
  int first, end;
  int start;  // of the first split: where the first page begins
  int size;   // positions of a split
  int count;
};

// None for padding's position.
__device__ __forceinline__ Splits splits_of(int position, int64_t window) {
  if (position < 0) return {};
  const int end = position + 1, first = window > 0 && end > window ? end - int(window) : 0;
  const int start = first / kPageTokens * kPageTokens;
  const int size = (end - start + kTile * kMostSplits - 1) / (kTile * kMostSplits) * kTile;
  return {first, end, start, size, (end - start + size - 1) / size};
}

// Of the scores of some positions: what their exponentials are multiplied by, and the sum of these.
struct Softmax {
  float largest, total;
};

// Blocks on an SM at least, or 0 for the compiler's own choice (4 for four queries of halves, 3 for eight): what leaves
// each kernel the registers that it needs.
template <typename T, int kQueries>
constexpr int kBlocks = kQueries == 1 ? 5 : sizeof(T) == sizeof(float) ? 4 : 0;

// What the first kernel leaves for the second: for each token, query head and split the sum of
// exp(score - largest) * value, and which `largest` that was.
struct Partial {
  float* sums;  // [tokens, query heads, splits, size]; null: there is one split, whose block writes the output
  Softmax* softmax;
  int64_t splits, size;
};

template <typename T>
struct Arguments {
  PagedCache cache;
  int64_t layer;
  Heads heads;
  float scale, cap;
  int64_t window;
  Tokens tokens;
  const T* projected;
  int64_t row;
  T* out;
  Partial partial;
};

// A block's shared memory, besides what depends on the head's size.
template <int kQueries>
struct Shared {
  alignas(16) float weights[kTile][kQueries];  // products with the keys, then exp(score - largest)
  int64_t pages[2][kTilePages];                // where a tile's keys begin in the pool; and those of the tile before
  Softmax softmax[kQueries];                   // over all tiles so far
  float factor[kQueries];                      // by which this tile changes the sums so far
};

__device__ __forceinline__ float score_of(float product, float scale, float cap) {
  return cap > 0 ? cap * tanhf(product * (scale / cap)) : product * scale;
}

// Which sums of weighted values are a thread's: one chunk of up to four queries, over the positions slot,
// slot + slots, ... of a tile. Threads for other queries read the same values at the same time.
template <int kQueries>
struct Share {
  static constexpr int kEach = kQueries < 4 ? kQueries : 4;
  int chunk, query, slot, slots;

  __device__ __forceinline__ explicit Share(int chunks) {
    const int parts = kQueries / kEach, rest = threadIdx.x / chunks;
    chunk = threadIdx.x % chunks;
    query = rest % parts * kEach;
    slot = rest / parts;
    slots = slots_for(chunks);  // a few threads may be left over
  }
  __host__ __device__ static constexpr int slots_for(int chunks) { return kThreads / (chunks * (kQueries / kEach)); }
};

// The queries that a warp weighs: every kWarps-th.
template <int kQueries>
constexpr int kQueriesOfWarp = (kQueries + kWarps - 1) / kWarps;

// One thread's part of the block's work: kQueries query heads that share a key-value head, on one split.
template <typename T, int kQueries, bool kAligned>
struct Worker {
  using Share = cuda::Share<kQueries>;
  using Sums = float[Share::kEach][kChunk<T>];
  using Running = Softmax[kQueriesOfWarp<kQueries>];

  const Arguments<T>& a;
  Shared<kQueries>& shared;
  float* queries;  // [kQueries, chunks], zeros where there is no query
  int64_t head;    // of keys and values
  int chunks;      // of a head

  __device__ __forceinline__ const T* key_of(const int64_t* pages, int i) const {
    return static_cast<const T*>(a.cache.pool) + pages[i / kPageTokens] + i % kPageTokens * int(a.heads.size);
  }
  __device__ __forceinline__ const T* value_of(const int64_t* pages, int i) const {
    return key_of(pages, i) + values_behind_keys(a.cache);
  }

  __device__ __forceinline__ void load_queries(const T* from, int count) const {
    for (int i = threadIdx.x; i < kQueries * chunks; i += kThreads) {
      const int q = i / chunks, c = i % chunks;
      Vector<T> chunk = {};
      if (q < count) chunk = load_chunk<kAligned>(from + q * a.heads.query_stride, c * kChunk<T>, a.heads.size);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) queries[i * kChunk<T> + j] = to_float(chunk.values[j]);
    }
  }

  // The products of queries and the keys at [from, to) of the tile.
  __device__ __forceinline__ void multiply(const int64_t* pages, int from, int to) const {
    const int lane = threadIdx.x % kKeyLanes, first = threadIdx.x / kKeyLanes;
    const T* keys[kKeys];
    float sums[kKeys][kQueries] = {};
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const int i = first + k * kKeysAtOnce;
      keys[k] = i >= from && i < to ? key_of(pages, i) : nullptr;
    }
    constexpr int kUnroll = kQueries == 1 ? 2 : 1;  // as the registers allow
#pragma unroll kUnroll
    for (int c = lane; c < chunks; c += kKeyLanes) {
      Vector<T> key[kKeys] = {};
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        if (keys[k]) key[k] = load_chunk<kAligned>(keys[k], c * kChunk<T>, a.heads.size);
      }
#pragma unroll
      for (int j = 0; j < kChunk<T>; j += kChunk<float>) {
#pragma unroll
        for (int q = 0; q < kQueries; ++q) {
          const Vector<float> query = load16(queries + (q * chunks + c) * kChunk<T> + j);
#pragma unroll
          for (int i = 0; i < kChunk<float>; ++i) {
#pragma unroll
            for (int k = 0; k < kKeys; ++k) sums[k][q] += query.values[i] * to_float(key[k].values[j + i]);
          }
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        float sum = sums[k][q];
#pragma unroll
        for (int lanes = 1; lanes < kKeyLanes; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
        if (lane == q % kKeyLanes) shared.weights[first + k * kKeysAtOnce][q] = sum;
      }
    }
  }

  // Products -> exp(score - largest), 0 outside of [from, to), for this warp's queries. `running` has them over all
  // tiles so far.
  __device__ __forceinline__ void weigh(int from, int to, Running& running) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (int own = 0; own < kQueriesOfWarp<kQueries>; ++own) {
      const int q = warp + own * kWarps;
      if (q >= kQueries) break;  // the whole warp
      const Softmax before = running[own];
      float scores[kTile / kWarp], largest = before.largest, total = 0;
#pragma unroll
      for (int k = 0; k < kTile / kWarp; ++k) {
        const int i = k * kWarp + lane;
        scores[k] = i >= from && i < to ? score_of(shared.weights[i][q], a.scale, a.cap) : -INFINITY;
        largest = fmaxf(largest, scores[k]);
      }
      largest = warp_max(largest);
#pragma unroll
      for (int k = 0; k < kTile / kWarp; ++k) {
        const float weight = expf(scores[k] - largest);
        shared.weights[k * kWarp + lane][q] = weight;
        total += weight;
      }
      const float factor = expf(before.largest - largest);
      running[own] = {largest, before.total * factor + warp_sum(total)};
      if (lane == 0) {
        shared.factor[q] = factor;
        shared.softmax[q] = running[own];
      }
    }
  }

  // Asks for the tile's values, which come behind its keys.
  __device__ __forceinline__ void prefetch_values(const int64_t* pages, int from, int to) const {
    constexpr int kLine = 128 / sizeof(T);
    const int size = a.heads.size, lines = (size + kLine - 1) / kLine;
    for (int i = threadIdx.x; i < (to - from) * lines; i += kThreads) {
      prefetch(value_of(pages, from + i / lines) + i % lines * kLine);
    }
  }

  // sums = factor * sums + the tile's weighted values, for this thread's queries, components and positions.
  __device__ __forceinline__ void gather(const int64_t* pages, int from, int to, Sums& sums) const {
    const Share share(chunks);
#pragma unroll
    for (int q = 0; q < Share::kEach; ++q) {
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) sums[q][j] *= shared.factor[share.query + q];
    }
    if (share.slot >= share.slots) return;
    for (int i = from + share.slot; i < to; i += kValues * share.slots) {
      Vector<T> values[kValues] = {};
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        const int at = i + k * share.slots;
        if (at < to) values[k] = load_chunk<kAligned>(value_of(pages, at), share.chunk * kChunk<T>, a.heads.size);
      }
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        const int at = i + k * share.slots;
#pragma unroll
        for (int q = 0; q < Share::kEach; ++q) {
          const float weight = at < to ? shared.weights[at][share.query + q] : 0.0f;
#pragma unroll
          for (int j = 0; j < kChunk<T>; ++j) sums[q][j] += weight * to_float(values[k].values[j]);
        }
      }
    }
  }

  // The sums of all threads, [slots, kQueries, chunks], where the queries were.
  __device__ __forceinline__ void store(const Sums& sums) const {
    const Share share(chunks);
    if (share.slot >= share.slots) return;
#pragma unroll
    for (int q = 0; q < Share::kEach; ++q) {
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        queries[((share.slot * kQueries + share.query + q) * chunks + share.chunk) * kChunk<T> + j] = sums[q][j];
      }
    }
  }
};

// Block (token, some query heads of a key-value head, split).
template <typename T, int kQueries, bool kAligned>
__global__ __launch_bounds__(kThreads, kBlocks<T, kQueries>) void attend_kernel(Arguments<T> a) {
  __shared__ Shared<kQueries> shared;
  DYNAMIC_SHARED(float, queries);  // then the threads' sums: [slots, kQueries, chunks]
  const int64_t token = blockIdx.x, size = a.heads.size;
  const int group = a.heads.query_heads / a.heads.key_value_heads, parts = (group + kQueries - 1) / kQueries;
  const int part = blockIdx.y % parts * kQueries, count = min(kQueries, group - part);
  const int chunks = (size + kChunk<T> - 1) / kChunk<T>, row = chunks * kChunk<T>;
  const Worker<T, kQueries, kAligned> worker{a, shared, queries, blockIdx.y / parts, chunks};
  const int64_t head = worker.head * group + part;  // the first one, of queries

  const Splits splits = splits_of(a.tokens.position[token], a.window);
  const int split = blockIdx.z;
  if (split >= splits.count) {
    const bool padding = splits.count == 0 && !a.partial.sums;
    T* const out = a.out + (token * a.heads.query_heads + head) * size;
    for (int i = threadIdx.x; padding && i < count * size; i += kThreads) out[i] = from_float<T>(0);
    return;
  }
  const int begin = splits.start + split * splits.size, end = min(begin + splits.size, splits.end);
  const int32_t* const all_pages = pages_of(a.tokens, token);

  worker.load_queries(a.projected + token * a.row + a.heads.queries + head * a.heads.query_stride, count);
  Softmax running[kQueriesOfWarp<kQueries>];
#pragma unroll
  for (Softmax& none : running) none = {-INFINITY, 0};
  float sums[Share<kQueries>::kEach][kChunk<T>] = {};
  for (int tile = begin; tile < end; tile += kTile) {
    int64_t* const pages = shared.pages[tile / kTile % 2];
    const int first = tile + threadIdx.x * kPageTokens;
    if (threadIdx.x < kTilePages && first < end) {
      pages[threadIdx.x] = keys_of(a.cache, all_pages[first / kPageTokens], a.layer, worker.head);
    }
    __syncthreads();
    const int from = max(splits.first - tile, 0), to = min(end - tile, kTile);
    worker.prefetch_values(pages, from, to);
    worker.multiply(pages, from, to);
    __syncthreads();
    worker.weigh(from, to, running);
    __syncthreads();
    worker.gather(pages, from, to, sums);
  }

  worker.store(sums);
  const int slots = Share<kQueries>::slots_for(chunks);
  __syncthreads();
  for (int i = threadIdx.x; i < count * row; i += kThreads) {
    float sum = 0;
    for (int s = 0; s < slots; ++s) sum += queries[s * kQueries * row + i];
    const int q = i / row, d = i % row;
    const int64_t out_row = token * a.heads.query_heads + head + q;
    if (a.partial.sums) {
      a.partial.sums[(out_row * a.partial.splits + split) * a.partial.size + d] = sum;
      if (d == 0) a.partial.softmax[out_row * a.partial.splits + split] = shared.softmax[q];
    } else if (d < size) {
      a.out[out_row * size + d] = from_float<T>(sum / shared.softmax[q].total);
    }
  }
}

// A split's sums are read by as many threads as they have chunks; eight of them at a time for heads of 128.
constexpr int kCombineThreads = 256;

// Block (token, query head): out = the splits' sums, put together.
template <typename T>
__global__ __launch_bounds__(kCombineThreads) void combine_kernel(Tokens tokens, int64_t window, Partial partial,
                                                                  T* out, int64_t head_size) {
  __shared__ Softmax softmax[kMostSplits];
  __shared__ Vector<float> slot_sums[kCombineThreads];
  const int64_t token = blockIdx.x, row = token * gridDim.y + blockIdx.y;
  const int count = splits_of(tokens.position[token], window).count, thread = threadIdx.x;
  if (thread < count) softmax[thread] = partial.softmax[row * partial.splits + thread];
  __syncthreads();
  float largest = -INFINITY;
  for (int s = thread % kWarp; s < count; s += kWarp) largest = fmaxf(largest, softmax[s].largest);
  largest = warp_max(largest);
  float total = 0;
  for (int s = thread % kWarp; s < count; s += kWarp) total += expf(softmax[s].largest - largest) * softmax[s].total;
  total = warp_sum(total);

  const int chunks = partial.size / kChunk<float>, slots = kCombineThreads / chunks;
  const int slot = thread / chunks, c = thread % chunks;
  const float* const sums = partial.sums + row * partial.splits * partial.size + c * kChunk<float>;
  Vector<float> own = {};
  if (slot < slots) {
#pragma unroll 4
    for (int s = slot; s < count; s += slots) {
      const Vector<float> sum = load16(sums + s * partial.size);
      const float weight = expf(softmax[s].largest - largest);
#pragma unroll
      for (int j = 0; j < kChunk<float>; ++j) own.values[j] += weight * sum.values[j];
    }
  }
  slot_sums[thread] = own;
  __syncthreads();
  for (int i = thread; i < head_size; i += kCombineThreads) {
    float sum = 0;
    for (int s = 0; s < slots; ++s) sum += slot_sums[s * chunks + i / kChunk<float>].values[i % kChunk<float>];
    out[row * head_size + i] = from_float<T>(count > 0 ? sum / total : 0.0f);
  }
}

}  // namespace

#if !defined(__CUDACC_RTC__)  // the host half
namespace {

// Splits for which there must be room.
int64_t most_splits(int64_t max_positions, int64_t window) {
  const int64_t seen = window > 0 ? std::min(max_positions, window + kPageTokens) : max_positions;
  return std::min<int64_t>(quotient_up(seen, kTile), kMostSplits);
}

// Calls use(integral constant) with how many of a key-value head's queries a block takes: they share what it reads. Of
// more than eight each block reads it again, from the second-level cache.
template <typename Use>
void with_queries(int64_t group, int64_t chunks, Use use) {
  if (group == 1) return use(std::integral_constant<int, 1>());
  if (group <= 4 || 2 * chunks > kThreads) return use(std::integral_constant<int, 4>());
  use(std::integral_constant<int, 8>());
}

}  // namespace

int64_t attention_workspace(const Heads& heads, int64_t tokens, int64_t max_positions) {
  const int64_t splits = most_splits(max_positions, 0), row = quotient_up(heads.size, 8) * 8;  // chunks of any type
  return splits > 1 ? tokens * heads.query_heads * splits * (row * sizeof(float) + sizeof(Softmax)) : 0;
}

void attention(const PagedCache& cache, int64_t layer, const Heads& heads, float scale, float cap, int64_t window,
               const Tokens& tokens, const void* projected, int64_t row, void* out, void* workspace,
               int64_t max_positions, Stream stream) {
  if (tokens.count == 0) return;
  with_type(cache.type, [&](auto element) {
    using T = decltype(element);
    const int64_t group = heads.query_heads / heads.key_value_heads, chunks = quotient_up(heads.size, kChunk<T>);
    if (chunks > kThreads) throw std::invalid_argument("attention: heads of more than 2048 bytes");
    Partial partial{nullptr, nullptr, most_splits(max_positions, window), chunks * kChunk<T>};
    if (partial.splits > 1) {
      partial.sums = static_cast<float*>(workspace);
      const int64_t sums = tokens.count * heads.query_heads * partial.splits * partial.size;
      partial.softmax = reinterpret_cast<Softmax*>(partial.sums + sums);
    }
    const auto* const queries_row = static_cast<const T*>(projected);
    const Arguments<T> arguments{cache,  layer,       heads, scale,                cap,    window,
                                 tokens, queries_row, row,   static_cast<T*>(out), partial};
    const auto start = [&](auto queries, auto flag) {
      const dim3 grid(tokens.count, heads.key_value_heads * quotient_up(group, queries.value), partial.splits);
      const int64_t sums = Share<queries.value>::slots_for(chunks) * queries.value * partial.size;
      launch<attend_kernel<T, queries.value, flag.value>>(grid, dim3(kThreads), sums * sizeof(float), stream,
                                                          arguments);
    };
    if (is_aligned<T>(cache.pool, heads.size) && is_aligned<T>(projected, row, heads.queries, heads.query_stride)) {
      with_queries(group, chunks, [&](auto queries) { start(queries, std::true_type()); });
    } else {
      start(std::integral_constant<int, 1>(), std::false_type());
    }
    if (partial.splits > 1) {
      launch<combine_kernel<T>>(dim3(tokens.count, heads.query_heads), dim3(kCombineThreads), 0, stream, tokens, window,
                                partial, static_cast<T*>(out), heads.size);
    }
  });
}

#endif

}  // namespace rlhf_fast::cuda
