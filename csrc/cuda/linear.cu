// y = x . W^T + bias for up to 16 rows of x.
//
// Where a layer has too few tiles to fill a GPU, several blocks share the k of each (split-K). They leave their sums in
// the workspace and the last to come adds them, in the order of k whichever it is. How many share depends on the
// layer's shape and type alone, so that a row's bits do not depend on the rows beside it.
#include <algorithm>

#include "linear_tile.h"

namespace rlhf_fast::cuda {
namespace {

constexpr int kMostLayers = 4;

// One layer of a launch.
template <typename T>
struct Part {
  Weights<T> weights;
  int64_t column;  // of y
  int first_block, splits, inputs;
  int* counters;
  float* sums;  // [tiles, splits, kMaxRows, outputs of a tile]
};

template <typename T>
struct Parts {
  Part<T> parts[kMostLayers];
  int count;
};

struct Output {
  Type type;
  void* y;
  int64_t stride;
};

template <typename T>
__device__ __forceinline__ void store(const Output& out, int64_t row, int64_t column, float value) {
  const int64_t i = row * out.stride + column;
  if (out.type == Type::float32) {
    static_cast<float*>(out.y)[i] = value;
  } else {
    static_cast<T*>(out.y)[i] = from_float<T>(value);
  }
}

template <typename T, int kRows, bool kTransposed, bool kAligned>
__global__ __launch_bounds__(kTileThreads, 1) void linear_kernel(Parts<T> parts, Rows<T> x, Output out) {
  using Tile = cuda::Tile<T, kTransposed>;
  __shared__ TileSums<T, kRows, kTransposed> sums[1];
  __shared__ bool is_last;

  Part<T> part = parts.parts[0];
#pragma unroll
  for (int i = 1; i < kMostLayers; ++i) {
    if (i < parts.count && int(blockIdx.x) >= parts.parts[i].first_block) part = parts.parts[i];
  }
  const int block = blockIdx.x - part.first_block, tile = block / part.splits, split = block % part.splits;
  const int first = split * part.inputs, last = min(part.weights.in, first + part.inputs);
  const Weights<T> layers[1] = {part.weights};
  sum_tile<kTransposed, kAligned>(layers, tile, x, first, last, sums);

  // Calls use(row, output of the tile) for the thread's share of the tile.
  const auto for_each = [&](auto use) {
    for (int i = threadIdx.x; i < x.count * Tile::kOutputs; i += kTileThreads) {
      const int row = i / Tile::kOutputs, output = i % Tile::kOutputs;
      if (tile * Tile::kOutputs + output < part.weights.out) use(row, output);
    }
  };
  const auto finish = [&](int row, int output, float sum) {
    const int column = tile * Tile::kOutputs + output;
    if (part.weights.bias) sum += to_float(part.weights.bias[column]);
    store<T>(out, row, part.column + column, sum);
  };
  if (part.splits == 1) {
    for_each([&](int row, int output) { finish(row, output, sums[0].of(row, output)); });
    return;
  }

  constexpr int kTileSize = kMaxRows * Tile::kOutputs;
  float* const tile_sums = part.sums + int64_t(tile) * part.splits * kTileSize;
  for_each([&](int row, int output) {
    tile_sums[split * kTileSize + row * Tile::kOutputs + output] = sums[0].of(row, output);
  });
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(&part.counters[tile], 1) == part.splits - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for_each([&](int row, int output) {
    float sum = 0;
    for (int i = 0; i < part.splits; ++i) sum += tile_sums[i * kTileSize + row * Tile::kOutputs + output];
    finish(row, output, sum);
  });
  if (threadIdx.x == 0) part.counters[tile] = 0;
}

}  // namespace

#if !defined(__CUDACC_RTC__)  // the host half
namespace {

constexpr int64_t kWantedBlocks = 128;  // about one for each SM of a large GPU
constexpr int64_t kMostSplits = 16;     // for one block to add

// How a layer is cut.
struct Cut {
  int64_t tiles, splits;
  int64_t outputs;  // of a tile
  int64_t inputs;   // of a split
};

template <typename T, bool kTransposed>
Cut cut(const Linear& layer) {
  using Tile = cuda::Tile<T, kTransposed>;
  constexpr int64_t kTurn = Tile::kTurnInputs;
  const int64_t tiles = quotient_up(layer.out, Tile::kOutputs), turns = quotient_up(layer.in, kTurn);
  const int64_t useful = quotient_up(turns, kTileWarps / 2);  // half of a block's warps have work
  const int64_t splits = std::min({quotient_up(kWantedBlocks, tiles), useful, kMostSplits});
  return {tiles, splits, Tile::kOutputs, quotient_up(turns, splits) * kTurn};
}

Cut cut(const Linear& layer) {
  Cut result;
  with_type(layer.type, [&](auto element) {
    with_flag(layer.transposed,
              [&](auto transposed) { result = cut<decltype(element), decltype(transposed)::value>(layer); });
  });
  return result;
}

// The workspace: for each tile of each layer a counter, how many of its blocks are done, at the same place in every
// launch; then a tile of sums for each block. The last block of a tile leaves its counter 0 for the next launch.
constexpr int64_t kCounters = kMostLayers * kWantedBlocks;  // a layer of more tiles than that is not split

int64_t sums_count(const Cut& how) {
  return how.splits == 1 ? 0 : how.tiles * how.splits * kMaxRows * how.outputs;
}

template <typename T>
bool reads_vectors(const Linear& layer) {
  return is_aligned<T>(layer.weight, layer.row_stride, layer.in, layer.transposed ? layer.out : 0);
}

}  // namespace

int64_t linear_workspace(const Linear& layer) {
  const int64_t sums = sums_count(cut(layer));
  return sums == 0 ? 0 : kCounters * int64_t(sizeof(int)) + sums * int64_t(sizeof(float));
}

void linear(const Linear& layer, const void* x, int64_t rows, int64_t x_row, Type out_type, void* y, int64_t y_row,
            void* workspace, Stream stream) {
  linear_many(&layer, 1, x, rows, x_row, out_type, y, y_row, workspace, stream);
}

void linear_many(const Linear* layers, int count, const void* x, int64_t rows, int64_t x_row, Type out_type, void* y,
                 int64_t y_row, void* workspace, Stream stream) {
  check_rows(rows);
  if (count > kMostLayers) {
    throw std::invalid_argument("a product of more than " + std::to_string(kMostLayers) + " layers");
  }
  with_type(layers[0].type, [&](auto element) {
    using T = decltype(element);
    Parts<T> parts{};
    bool aligned = is_aligned<T>(x, x_row);
    int64_t blocks = 0, column = 0;
    auto* const counters = static_cast<int*>(workspace);
    auto* sums = reinterpret_cast<float*>(counters + kCounters);
    for (int i = 0; i < count; ++i) {
      const Linear& layer = layers[i];
      const Cut how = cut(layer);
      parts.parts[i] = {weights<T>(layer),
                        column,
                        int(blocks),
                        int(how.splits),
                        int(how.inputs),
                        counters + i * kWantedBlocks,
                        sums};
      aligned = aligned && reads_vectors<T>(layer);
      blocks += how.tiles * how.splits;
      column += layer.out;
      sums += sums_count(how);
    }
    parts.count = count;
    const Rows<T> input{static_cast<const T*>(x), int(rows), x_row};
    const Output output{out_type, y, y_row};
    with_flag(rows > 8, [&](auto many) {
      with_flag(layers[0].transposed, [&](auto transposed) {
        with_flag(aligned, [&](auto aligned) {
          constexpr int kRows = decltype(many)::value ? 16 : 8;
          launch<linear_kernel<T, kRows, decltype(transposed)::value, decltype(aligned)::value>>(
              dim3(blocks), dim3(kTileThreads), 0, stream, parts, input, output);
        });
      });
    });
  });
}

#endif

}  // namespace rlhf_fast::cuda
