// The product of up to 16 rows of x with a tile of a layer's outputs, as linear.cu and gated_mlp.cu take it.
//
// With few rows the weights are all that counts: each of them is read once, straight into the registers that it is used
// from, 16 bytes at a time, with kLoadsInFlight such loads of every lane under way. x is small and stays in the first-
// level cache, which the weights pass by.
//
// A block is one tile; its warps take turns along k. A lane is the `member`-th of the four in its `group`: the group
// has kLaneOutputs outputs of the tile, the member a vector's worth of k in each step.
//
// A sum's order depends on the layer's shape and type alone, not on the number of rows.
#pragma once

#include <stdexcept>
#include <string>

#include "rows.h"

namespace rlhf_fast::cuda {

constexpr int kTileWarps = 8;
constexpr int kTileThreads = 32 * kTileWarps;

// Loads of 16 bytes. With 8 a block has 32 KiB under way; an SM of an H100 needs about 20 (3.35 TB/s / 132 * 0.8 us).
// Float sums leave registers for 4.
template <typename T>
constexpr int kLoadsInFlight = sizeof(T) == 2 ? 8 : 4;

template <typename T, bool kTransposed>
struct Tile {
  static constexpr int kLaneOutputs = kTransposed ? kChunk<T> : 2;
  static constexpr int kOutputs = 8 * kLaneOutputs;
  static constexpr int kLoads = kTransposed ? kChunk<T> : 2;  // of a lane in a step
  static constexpr int kSteps = kLoadsInFlight<T> / kLoads;   // of a turn
  static constexpr int kStepInputs = 4 * kChunk<T>;
  static constexpr int kTurnInputs = kSteps * kStepInputs;

  __device__ static constexpr int output(int group, int lane_output) {
    return kTransposed ? group * kLaneOutputs + lane_output : 8 * lane_output + group;
  }
  // Of a lane's j-th load, from the first one's on.
  __device__ static constexpr int row(int j) { return kTransposed ? j : output(0, j); }
};

template <typename T>
struct Weights {
  const T* weight;
  const T* bias;
  int out, in;
  int64_t row_stride;
};

template <typename T>
struct Rows {
  const T* x;
  int count;
  int64_t stride;
};

#if !defined(__CUDACC_RTC__)
template <typename T>
Weights<T> weights(const Linear& layer) {
  return {static_cast<const T*>(layer.weight), static_cast<const T*>(layer.bias), int(layer.out), int(layer.in),
          layer.row_stride};
}

// A tile's sums have no room for more rows.
inline void check_rows(int64_t rows) {
  if (rows >= 1 && rows <= kMaxRows) return;
  throw std::invalid_argument("a product of " + std::to_string(rows) + " rows; the kernels take 1 to " +
                              std::to_string(kMaxRows));
}
#endif

// What a register holds: a float, or two 16-bit numbers, the first in the low half. Held apart they would cost
// instructions to join.
template <typename T>
using Word = std::conditional_t<sizeof(T) == 2, uint32_t, float>;

template <typename T>
using Words = Vector<Word<T>>;

__device__ __forceinline__ uint32_t bits(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
__device__ __forceinline__ uint32_t bits(__half x) { return __half_as_ushort(x); }

// The next elements of a row that has `size` of them left; zeros after its end.
template <typename T>
__device__ __forceinline__ Words<T> load_unaligned(const T* row, int size) {
  const Vector<T> chunk = load_chunk<false>(row, 0, size);
  if constexpr (sizeof(T) == 4) {
    return chunk;
  } else {
    Words<T> words;
#pragma unroll
    for (int j = 0; j < 4; ++j) words.values[j] = bits(chunk.values[2 * j]) | bits(chunk.values[2 * j + 1]) << 16;
    return words;
  }
}

// A lane's weights of one step as they lie in memory: a vector for each output, or for each k when transposed.
template <typename T, bool kTransposed, bool kAligned>
struct Step {
  using Tile = cuda::Tile<T, kTransposed>;
  Words<T> vectors[Tile::kLoads];

  // start: the weight of the lane's first output and the step's first k of the lane. Zeros where there are none.
  __device__ __forceinline__ void load(const Weights<T>& from, const T* start, int output, int k) {
    const int column = kTransposed ? output : k, columns = kTransposed ? from.out : from.in;
#pragma unroll
    for (int j = 0; j < Tile::kLoads; ++j) {
      const bool there = kTransposed ? k + j < from.in : output + Tile::row(j) < from.out;
      const T* const weights = start + Tile::row(j) * from.row_stride;
      vectors[j] = {};
      if (!there || column >= columns) continue;
      if constexpr (kAligned) {
        vectors[j] = load16_streaming(reinterpret_cast<const Word<T>*>(weights));
      } else {
        vectors[j] = load_unaligned(weights, columns - column);
      }
    }
  }

  // The weight of the lane's output and k; of 16-bit ones those of k, which is even, and k + 1.
  __device__ __forceinline__ Word<T> at(int output, int k) const {
    if constexpr (sizeof(T) == 4) {
      return kTransposed ? vectors[k].values[output] : vectors[output].values[k];
    } else if constexpr (!kTransposed) {
      return vectors[output].values[k / 2];
    } else {
      const uint32_t low = vectors[k].values[output / 2], high = vectors[k + 1].values[output / 2];
      return output % 2 == 0 ? (low & 0xffff) | high << 16 : low >> 16 | (high & 0xffff0000);
    }
  }
};

// The lane's sums of 16-bit products, by tensor cores: weights are the 16 rows of m16n8k16, x its 8 columns. Which k
// takes which place in the instruction is free as long as both operands agree, so that its registers are what the lane
// loads anyway: of a vector's k each instruction takes four.
template <typename T, int kRows, int kLaneOutputs>
struct TensorCoreSums {
  float sums[kLaneOutputs / 2][kRows / 8][4] = {};

  // Calls use(lane's output, row, sum) for what the lane has in the end.
  template <typename Use>
  __device__ __forceinline__ void for_each(int member, Use use) const {
#pragma unroll
    for (int o = 0; o < kLaneOutputs; ++o) {
#pragma unroll
      for (int v = 0; v < kRows / 8; ++v) {
        use(o, 8 * v + 2 * member, sums[o / 2][v][o % 2 * 2]);
        use(o, 8 * v + 2 * member + 1, sums[o / 2][v][o % 2 * 2 + 1]);
      }
    }
  }
};

// Adds a step of all layers. load_row(n): the lane's k of row n of x.
template <typename T, int kRows, int kLaneOutputs, typename Step, int kLayers, typename LoadRow>
__device__ __forceinline__ void add(const Step (&weights)[kLayers], int group, LoadRow load_row,
                                    TensorCoreSums<T, kRows, kLaneOutputs> (&sums)[kLayers]) {
  Words<T> x[kRows / 8];
#pragma unroll
  for (int v = 0; v < kRows / 8; ++v) x[v] = load_row(8 * v + group);
#pragma unroll
  for (int k = 0; k < kChunk<T>; k += 4) {
#pragma unroll
    for (int l = 0; l < kLayers; ++l) {
#pragma unroll
      for (int o = 0; o < kLaneOutputs; o += 2) {
        const uint32_t a[4] = {weights[l].at(o, k), weights[l].at(o + 1, k), weights[l].at(o, k + 2),
                               weights[l].at(o + 1, k + 2)};
#pragma unroll
        for (int v = 0; v < kRows / 8; ++v) {
          const uint32_t b[2] = {x[v].values[k / 2], x[v].values[k / 2 + 1]};
          mma_m16n8k16<T>(sums[l].sums[o / 2][v], a, b);
        }
      }
    }
  }
}

// The lane's sums of float32 products. A group's members have different k: their sums are added in the end.
template <int kRows, int kLaneOutputs>
struct FloatSums {
  float sums[kLaneOutputs][kRows] = {};

  template <typename Use>
  __device__ __forceinline__ void for_each(int member, Use use) const {
#pragma unroll
    for (int o = 0; o < kLaneOutputs; ++o) {
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        const float half = sums[o][n] + __shfl_xor_sync(0xffffffff, sums[o][n], 1);
        const float whole = half + __shfl_xor_sync(0xffffffff, half, 2);
        if (n % 4 == member) use(o, n, whole);
      }
    }
  }
};

template <int kRows, int kLaneOutputs, typename Step, int kLayers, typename LoadRow>
__device__ __forceinline__ void add(const Step (&weights)[kLayers], int, LoadRow load_row,
                                    FloatSums<kRows, kLaneOutputs> (&sums)[kLayers]) {
#pragma unroll
  for (int n = 0; n < kRows; ++n) {
    const Words<float> x = load_row(n);
#pragma unroll
    for (int l = 0; l < kLayers; ++l) {
#pragma unroll
      for (int o = 0; o < kLaneOutputs; ++o) {
        float& sum = sums[l].sums[o][n];
#pragma unroll
        for (int k = 0; k < kChunk<float>; ++k) sum = fmaf(weights[l].at(o, k), x.values[k], sum);
      }
    }
  }
}

template <typename T, int kRows, int kLaneOutputs>
using LaneSums =
    std::conditional_t<sizeof(T) == 2, TensorCoreSums<T, kRows, kLaneOutputs>, FloatSums<kRows, kLaneOutputs>>;

// A block's sums, in shared memory: each warp has those over its share of k.
template <typename T, int kRows, bool kTransposed>
struct TileSums {
  float warps[kTileWarps][kRows][Tile<T, kTransposed>::kOutputs];

  __device__ __forceinline__ float of(int row, int output) const {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kTileWarps; ++warp) sum += warps[warp][row][output];
    return sum;
  }
};

// out[l] = the sums over k = first, ..., last - 1 for a tile of each of the layers, which share x and have one shape.
// `first` and `last` are multiples of kTurnInputs, or `last` is the layers' `in`. Ends with a barrier.
template <bool kTransposed, bool kAligned, typename T, int kRows, int kLayers>
__device__ __forceinline__ void sum_tile(const Weights<T> (&layers)[kLayers], int tile, const Rows<T>& rows, int first,
                                         int last, TileSums<T, kRows, kTransposed> (&out)[kLayers]) {
  using Tile = cuda::Tile<T, kTransposed>;
  constexpr int kSteps = Tile::kSteps / kLayers, kTurn = kSteps * Tile::kStepInputs;
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  const int output = tile * Tile::kOutputs + Tile::output(group, 0);
  int k = first + warp * kTurn + member * kChunk<T>;
  // Addresses are carried on: computed for each load they would be most of the instructions.
  const T *weights[kLayers], *x = rows.x + k;
#pragma unroll
  for (int l = 0; l < kLayers; ++l) {
    const int64_t row = kTransposed ? k : output, column = kTransposed ? output : k;
    weights[l] = layers[l].weight + row * layers[l].row_stride + column;
  }
  LaneSums<T, kRows, Tile::kLaneOutputs> sums[kLayers];
  for (int turn = first + warp * kTurn; turn < last; turn += kTileWarps * kTurn) {
    Step<T, kTransposed, kAligned> steps[kSteps][kLayers];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int l = 0; l < kLayers; ++l) {
        const T* const start = weights[l] + s * Tile::kStepInputs * (kTransposed ? layers[l].row_stride : 1);
        steps[s][l].load(layers[l], start, output, k + s * Tile::kStepInputs);
      }
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const auto load_row = [&](int row) -> Words<T> {
        const int left = layers[0].in - k - s * Tile::kStepInputs;
        if (row >= rows.count || left <= 0) return {};
        const T* const start = x + row * rows.stride + s * Tile::kStepInputs;
        if constexpr (kAligned) return load16(reinterpret_cast<const Word<T>*>(start));
        return load_unaligned(start, left);
      };
      add(steps[s], group, load_row, sums);
    }
    k += kTileWarps * kTurn;
    x += kTileWarps * kTurn;
#pragma unroll
    for (int l = 0; l < kLayers; ++l) {
      weights[l] += kTileWarps * kTurn * (kTransposed ? layers[l].row_stride : 1);
    }
  }
#pragma unroll
  for (int l = 0; l < kLayers; ++l) {
    sums[l].for_each(member, [&](int lane_output, int row, float sum) {
      out[l].warps[warp][row][Tile::output(group, lane_output)] = sum;
    });
  }
  __syncthreads();
}

}  // namespace rlhf_fast::cuda
