// Where the paged cache keeps what: kernels.h's PagedCache and Tokens, on the device.
#pragma once

#include "device.h"
#include "kernels.h"

namespace rlhf_fast::cuda {

enum class Kept { keys, values };

// Keys or values of one head in a page: [kPageTokens, head_size].
template <typename T>
__device__ __forceinline__ T* page_of(const PagedCache& cache, int64_t page, int64_t layer, Kept kept, int64_t head) {
  const int64_t number = ((page * cache.layers + layer) * 2 + int64_t(kept)) * cache.heads + head;
  return static_cast<T*>(cache.pool) + number * kPageTokens * cache.head_size;
}

// The pages of a token's sequence, by position / kPageTokens.
__device__ __forceinline__ const int32_t* pages_of(const Tokens& tokens, int64_t token) {
  return tokens.pages + tokens.sequence[token] * tokens.max_pages;
}

}  // namespace rlhf_fast::cuda
