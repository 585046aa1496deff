// Generalised advantage estimation along rows, which gae and shaped_gae share: one pass over the memory.
//
// The recurrence is a chain, a few cycles a token and the next token waits for it. So kWidth rows go together, a lane
// each. Blocks of their columns are brought into a tile that stays in the first-level cache; there the lanes run over
// the columns from the right. What a lane computes does not depend on the others.
#pragma once

#include <cstdint>
#include <cstring>

#include "masked.h"
#include "transpose.h"

namespace rlhf_fast {

// Columns are contiguous; rows of inputs lie a stride apart, in elements, rows of outputs `columns`. "real" is double
// or float, the same for all.
struct RowsOf {
  const void* data;
  int64_t stride;
};

struct Scan {
  bool float64;
  int64_t columns;
  RowsOf mask;  // bytes, 1 or 0
  RowsOf values;
  const void* last_values;  // real [rows], or null for zeros
  double gamma;
  double lam;
  void* advantages;
  void* returns;
};

namespace RLHF_FAST_ISA {

constexpr int64_t kScanBlock = 128;

template <typename T>
const T* row_of(const RowsOf& rows, int64_t row) {
  return static_cast<const T*>(rows.data) + row * rows.stride;
}

template <typename R>
struct RowLanes {
  using type = Floats;
};
template <>
struct RowLanes<double> {
  using type = Doubles;
};

// Longer than the block: rows a power of two apart would share their place in the cache.
constexpr int64_t kTileRow = kScanBlock + 16;

template <typename R>
struct Tile {
  R rewards[kWidth][kTileRow];  // then the advantages
  R values[kWidth][kTileRow];
  R mask[kWidth][kTileRow];  // 1 or 0
};

// The lanes' state, of the next masked token to the right.
template <typename R>
struct Next {
  typename RowLanes<R>::type value{};
  typename RowLanes<R>::type advantage{};
};

// out[t] = f(t) where the mask is True, else 0.
template <typename R, typename F>
inline void fill_masked(const uint8_t* __restrict mask, R* __restrict out, int64_t count, F f) {
  for (int64_t t = 0; t < count; ++t) out[t] = keep(R(f(t)), mask[t]);
}

// The tile's columns from the right, `count` of them, a multiple of 4: rewards become advantages, 0 outside the mask.
template <typename R>
inline void scan_tile(Tile<R>& tile, int64_t count, R gamma, R decay, Next<R>& next) {
  using Vector = typename RowLanes<R>::type;
  const Vector zero{};
  for (int64_t t = count - 4; t >= 0; t -= 4) {
    Vector rewards[4], values[4], mask[4];
    load_columns(&tile.rewards[0][t], kTileRow, rewards);
    load_columns(&tile.values[0][t], kTileRow, values);
    load_columns(&tile.mask[0][t], kTileRow, mask);
    for (int c = 3; c >= 0; --c) {
      const Vector delta = rewards[c] + gamma * next.value - values[c];
      const Vector advantage = delta + decay * next.advantage;
      next.advantage = mask[c] != zero ? advantage : next.advantage;
      next.value = mask[c] != zero ? values[c] : next.value;
      rewards[c] = mask[c] != zero ? advantage : zero;
    }
    store_columns(&tile.rewards[0][t], kTileRow, rewards);
  }
}

// Rows begin to end - 1. load_rewards(row, first, count, out) writes count masked rewards from column `first` on to out.
template <typename R, typename LoadRewards>
void scan_rows(const Scan& args, int64_t begin, int64_t end, LoadRewards load_rewards) {
  if (args.columns == 0) return;  // then tensors may have no memory at all, not even to copy nothing from
  alignas(64) Tile<R> tile{};
  for (int64_t row = begin; row < end; row += kWidth) {
    const int64_t rows = end - row < kWidth ? end - row : kWidth;  // lanes without a row compute, and are not stored
    Next<R> next;
    if (args.last_values) {
      for (int64_t i = 0; i < rows; ++i) next.value[i] = static_cast<const R*>(args.last_values)[row + i];
    }
    for (int64_t first = (args.columns - 1) / kScanBlock * kScanBlock; first >= 0; first -= kScanBlock) {
      const int64_t count = args.columns - first < kScanBlock ? args.columns - first : kScanBlock;
      for (int64_t i = 0; i < rows; ++i) {
        const uint8_t* const mask = row_of<uint8_t>(args.mask, row + i) + first;
        const R* const values = row_of<R>(args.values, row + i) + first;
        fill_masked<R>(mask, tile.mask[i], count, [](int64_t) { return R(1); });
        fill_masked<R>(mask, tile.values[i], count, [=](int64_t t) { return values[t]; });
        for (int64_t t = count; t < kScanBlock; ++t) tile.mask[i][t] = 0;
        load_rewards(row + i, first, count, tile.rewards[i]);
      }
      scan_tile<R>(tile, (count + 3) / 4 * 4, R(args.gamma), R(args.gamma * args.lam), next);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t start = (row + i) * args.columns + first;
        memcpy(static_cast<R*>(args.advantages) + start, tile.rewards[i], count * sizeof(R));
        R* const __restrict returns = static_cast<R*>(args.returns) + start;
        for (int64_t t = 0; t < count; ++t) returns[t] = tile.rewards[i][t] + tile.values[i][t];
      }
    }
  }
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
