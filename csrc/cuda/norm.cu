#include <algorithm>

#include "device.h"
#include "kernels.h"
#include "rows.h"

namespace rlhf_fast::cuda {
namespace {

constexpr int kWarp = 32;

// One chunk a thread up to 4096 halves, so that a decode step's row is read at once. Two blocks fit on an SM: without
// saying so, the compiler would spill registers to let three.
constexpr int kMostThreads = 512;

// One warp's share of each sum over the row: of a mean and a variance for each of the two norms.
struct Partial {
  float sums[4][kMostThreads / kWarp];
};

// The sum over the block, the same in all its threads. Each sum has shared memory of its own: one barrier does.
__device__ __forceinline__ float block_sum(float value, float (&partial)[kMostThreads / kWarp]) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const float own = warp_sum(value);
  if (lane == 0) partial[warp] = own;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : 0.0f);
}

// The row that a block works on, in shared memory; each thread reads and writes every blockDim.x-th chunk, no other.
template <typename T>
struct Row {
  Vector<T>* chunks;
  int64_t size;

  // Calls use(chunk, its first element's index) for each chunk of this thread.
  template <typename Use>
  __device__ __forceinline__ void for_each_chunk(Use use) const {
#pragma unroll 2
    for (int64_t c = threadIdx.x; c * kChunk<T> < size; c += blockDim.x) use(chunks[c], c * kChunk<T>);
  }

  // The sum over the row of f(its element).
  template <typename F>
  __device__ __forceinline__ float sum_of(float (&partial)[kMostThreads / kWarp], F f) const {
    float own = 0;
    for_each_chunk([&](const Vector<T>& chunk, int64_t i) {
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) own += i + j < size ? f(to_float(chunk.values[j])) : 0.0f;
    });
    return block_sum(own, partial);
  }
};

// A norm's weights and biases for one chunk.
template <typename T, bool kAligned>
struct Affine {
  float weight[kChunk<T>], bias[kChunk<T>];

  __device__ __forceinline__ void load(const Norm& norm, int64_t i, int64_t size) {
    load_floats(norm.weight, 1.0f, i, size, weight);
    load_floats(norm.bias, 0.0f, i, size, bias);
  }

 private:
  __device__ __forceinline__ static void load_floats(const float* row, float absent, int64_t i, int64_t size,
                                                     float (&out)[kChunk<T>]) {
#pragma unroll
    for (int j = 0; j < kChunk<T>; j += kChunk<float>) {
      Vector<float> some = {};
      if (row && i + j < size) some = load_chunk<kAligned>(row, i + j, size);
#pragma unroll
      for (int k = 0; k < kChunk<float>; ++k) out[j + k] = row ? some.values[k] : absent;
    }
  }
};

// Calls use(y, i) with the chunks of y = norm(row). `affine`: of the thread's first chunk; the next are asked for one
// chunk ahead.
template <bool kAligned, typename T, typename Use>
__device__ __forceinline__ void normalise(const Norm& norm, Affine<T, kAligned>& affine, const Row<T>& row,
                                          float (*partial)[kMostThreads / kWarp], Use use) {
  float mean = 0;
  if (norm.kind == Norm::Kind::layer) {
    mean = row.sum_of(partial[0], [](float x) { return x; }) / float(row.size);
  }
  const float square = row.sum_of(partial[1], [=](float x) { return (x - mean) * (x - mean); });
  const float factor = 1.0f / sqrtf(square / float(row.size) + norm.epsilon);
  row.for_each_chunk([&](const Vector<T>& chunk, int64_t i) {
    Vector<T> y;
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) {
      float scaled = (to_float(chunk.values[j]) - mean) * factor;
      if (norm.round_before_weight) scaled = rounded<T>(scaled);
      y.values[j] = from_float<T>(scaled * affine.weight[j] + affine.bias[j]);
    }
    affine.load(norm, i + blockDim.x * kChunk<T>, row.size);
    use(y, i);
  });
}

// A block is a row. y may be x: a thread writes only what it alone reads.
template <typename T, bool kAligned>
__global__ __launch_bounds__(kMostThreads, 2) void add_norm_kernel(Norm out_norm, const T* x, float residual_scale,
                                                                T* residual, Norm norm, T* y, int64_t size) {
  __shared__ Partial partial;
  DYNAMIC_SHARED(Vector<T>, chunks);
  const Row<T> row{chunks, size};
  const int64_t first = int64_t(blockIdx.x) * size;
  x = x ? x + first : x;
  y = y ? y + first : y;
  residual += first;
  // The weights come from far, as the rows do: asked for first, they arrive together.
  Affine<T, kAligned> affine;
  affine.load(norm, threadIdx.x * kChunk<T>, size);
  const bool normed = x && out_norm.kind != Norm::Kind::none;
  if (normed) {
    Affine<T, kAligned> out_affine;
    out_affine.load(out_norm, threadIdx.x * kChunk<T>, size);
    row.for_each_chunk([&](Vector<T>& chunk, int64_t i) { chunk = load_chunk<kAligned>(x, i, size); });
    const auto keep = [&](const Vector<T>& value, int64_t i) { chunks[i / kChunk<T>] = value; };
    normalise(out_norm, out_affine, row, partial.sums, keep);
  }
  row.for_each_chunk([&](Vector<T>& chunk, int64_t i) {
    Vector<T> sum = load_chunk<kAligned>(residual, i, size);
    if (x) {
      const Vector<T> added = normed ? chunk : load_chunk<kAligned>(x, i, size);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        const float value = rounded<T>(to_float(added.values[j]) * residual_scale);
        sum.values[j] = from_float<T>(value + to_float(sum.values[j]));
      }
      store_chunk<kAligned>(residual, i, size, sum);
    }
    chunk = sum;
  });
  if (!y) return;
  const auto store = [&](const Vector<T>& value, int64_t i) { store_chunk<kAligned>(y, i, size, value); };
  if (norm.kind == Norm::Kind::none) return row.for_each_chunk(store);
  normalise(norm, affine, row, partial.sums + 2, store);
}

}  // namespace

#if !defined(__CUDACC_RTC__)  // the host half

void add_norm(Type type, const Norm& out_norm, const void* x, float residual_scale, void* residual, const Norm& norm,
              void* y, int64_t rows, int64_t size, Stream stream) {
  if (rows == 0) return;
  with_type(type, [&](auto element) {
    using T = decltype(element);
    bool aligned = is_aligned<T>(residual, size) && is_aligned<T>(x) && is_aligned<T>(y);
    for (const Norm& part : {out_norm, norm}) aligned &= is_aligned<float>(part.weight) && is_aligned<float>(part.bias);
    with_flag(aligned, [&](auto flag) {
      const int64_t chunks = quotient_up(size, kChunk<T>);
      const int64_t threads = std::min<int64_t>(quotient_up(chunks, kWarp) * kWarp, kMostThreads);
      launch<add_norm_kernel<T, flag.value>>(dim3(rows), dim3(threads), chunks * sizeof(Vector<T>), stream, out_norm,
                                             static_cast<const T*>(x), residual_scale, static_cast<T*>(residual), norm,
                                             static_cast<T*>(y), size);
    });
  });
}

#endif

}  // namespace rlhf_fast::cuda
