// Where the paged cache keeps what: kernels.h's PagedCache and Tokens, on the device.
#pragma once

#include "device.h"
#include "kernels.h"

namespace rlhf_fast::cuda {

// Where in the pool, in elements, a page's keys of one head begin: [kPageTokens, head_size].
__device__ __forceinline__ int64_t keys_of(const PagedCache& cache, int64_t page, int64_t layer, int64_t head) {
  return ((page * cache.layers + layer) * 2 * cache.heads + head) * kPageTokens * cache.head_size;
}

// From a page's keys to its values.
__device__ __forceinline__ int64_t values_behind_keys(const PagedCache& cache) {
  return cache.heads * kPageTokens * cache.head_size;
}

// The pages of a token's sequence, by position / kPageTokens.
__device__ __forceinline__ const int32_t* pages_of(const Tokens& tokens, int64_t token) {
  return tokens.pages + tokens.sequence[token] * tokens.max_pages;
}

}  // namespace rlhf_fast::cuda
