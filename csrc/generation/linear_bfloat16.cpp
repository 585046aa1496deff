// A lane of a vector of sums is an output, and vdpbf16ps adds the two products of one pair of k after the other to it.
// Each block of 512 of k, or of 1024 where there are more than 1024, is summed from 0; a block's sum is added to that of
// the blocks before it, and the bias comes last. No number of rows or outputs, no place in memory and no thread changes
// that.
//
// In memory the pairs of one output are side by side, where a vector wants one pair of 16 outputs: squares of 16 x 16
// pairs are turned in registers. With few rows of x each half of a square is used at once; for a single row turning is
// most of the work beside reading the weights. With more rows the squares of some outputs become a panel in the cache,
// which all rows use; the next panel's memory is asked for meanwhile.
#include "linear_bfloat16.h"

#include "../cpu/simd.h"

#if defined(RLHF_FAST_AVX512)

#define UNROLLED _Pragma("GCC unroll 16")

// Only a CPU for which multiplies_bfloat16() is true runs such a function.
#define WITH_PAIRS __attribute__((target("avx512bf16")))

namespace rlhf_fast::RLHF_FAST_ISA {
namespace {

constexpr int kFewRows = 8;  // whose sums fit into registers beside a square

// A micro-kernel's rows and vectors of outputs for more rows: 24 of 32 registers are sums.
constexpr int kMostRows = kRowsOfGroup;
constexpr int kVectors = 2;

constexpr int64_t kSquare = 2 * kWidth;  // inputs
constexpr int64_t kLongBlock = 1024;
constexpr int64_t inputs_of_block(int64_t in) { return in <= kLongBlock ? kLongBlock / 2 : kLongBlock; }

constexpr int64_t kRowsBytes = 512 << 10;  // of pairs of x that each panel meets, in the second-level cache
constexpr int64_t kFewestGroups = 4;       // that it meets at least
constexpr int64_t kBetweenFetches = 16;    // pairs

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The first `count` lanes of 32, or of 16.
inline __mmask32 first_lanes(int64_t count) { return count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0; }

WITH_PAIRS inline Floats add_products(Floats sums, __m512i a, uint32_t b) {
  return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)_mm512_set1_epi32(int32_t(b)));
}

// In each quarter of four rows: rows[i] = what was lane i of each row
__attribute__((always_inline)) inline void turn_quarters(__m512i* rows) {
  const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
  const __m512i c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
  rows[0] = _mm512_unpacklo_epi64(a, c);
  rows[1] = _mm512_unpackhi_epi64(a, c);
  rows[2] = _mm512_unpacklo_epi64(b, d);
  rows[3] = _mm512_unpackhi_epi64(b, d);
}

// rows[i] = what was lane i of each row
inline void transpose(__m512i (&rows)[16]) {
  UNROLLED for (int i = 0; i < 16; i += 4) turn_quarters(rows + i);
  __m512i t[16];
  UNROLLED for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  UNROLLED for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Some outputs and some of k, with zeros up to whole squares.
struct Weights {
  const bfloat16* weight;
  int64_t row_stride;
  int64_t outputs, inputs;
  bool transposed;
  int64_t ahead;  // elements from what is read to what is asked for then

  Weights from(int64_t n, int64_t k) const {
    return {weight + (transposed ? k * row_stride + n : n * row_stride + k), row_stride, outputs - n, inputs - k,
            transposed, ahead};
  }

  // pairs[i]: the i-th pair of k of the first 16 outputs
  void square(__m512i (&pairs)[16]) const {
    if (transposed) {
      UNROLLED for (int i = 0; i < 16; ++i) {
        pairs[i] = _mm512_or_si512(lanes(2 * i), _mm512_slli_epi32(lanes(2 * i + 1), 16));
      }
      return;
    }
    const __mmask32 there = first_lanes(inputs);
    UNROLLED for (int i = 0; i < 16; ++i) {
      const bfloat16* const row = weight + (i < outputs ? i : 0) * row_stride;
      __builtin_prefetch(row + ahead, 0, 2);
      pairs[i] = _mm512_maskz_loadu_epi16(i < outputs ? there : 0, row);
    }
    transpose(pairs);
  }

  // The same of pair first + i, first 0 or 8, of a square that is whole and not transposed. Loads of half a row do what
  // a quarter of transpose's shuffles does.
  __attribute__((always_inline)) void half_square(int first, __m512i (&pairs)[8]) const {
    const auto half = [&](int row) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + row * row_stride + 2 * first));
    };
    __m512i rows[8];
    UNROLLED for (int i = 0; i < 8; ++i) {
      __builtin_prefetch(weight + (first + i) * row_stride + ahead, 0, 2);
      const int row = i < 4 ? i : i + 4;
      rows[i] = _mm512_mask_broadcast_i64x4(_mm512_castsi256_si512(half(row)), 0xf0, half(row + 4));
    }
    turn_quarters(rows);
    turn_quarters(rows + 4);
    UNROLLED for (int i = 0; i < 4; ++i) {
      pairs[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
      pairs[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    }
  }

  // Of transposed weights the k-th row, an output in the low half of each lane.
  __m512i lanes(int64_t k) const {
    const bfloat16* const row = weight + (k < inputs ? k : 0) * row_stride;
    __builtin_prefetch(row + ahead, 0, 2);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k < inputs ? first_lanes(outputs) : 0, row));
  }
};

// A group of rows, and what becomes of its sums over a block of k.
struct Rows {
  const uint32_t* x;  // [pairs][count]
  int64_t count;
  float* y;
  int64_t y_stride;
  bool first;          // y holds no sums yet
  const Floats* bias;  // of each vector of outputs; null but for the last block

  // Vector v of outputs, `outputs` from its first one on.
  void put(int row, int v, int64_t outputs, Floats sums) const {
    const __mmask16 there = first_lanes(outputs);
    float* const to = y + row * y_stride + v * kWidth;
    if (!first) sums = add(_mm512_maskz_loadu_ps(there, to), sums);
    if (bias) sums = add(sums, bias[v]);
    _mm512_mask_storeu_ps(to, there, sums);
  }
};

// ---- few rows -------------------------------------------------------------------------------------------------------

// 16 outputs. kWhole: all squares are whole and not transposed.
template <int kRows, bool kWhole>
WITH_PAIRS __attribute__((noinline)) void multiply(const Weights& weights, const Rows& rows) {
  constexpr int kAtOnce = kWhole ? 8 : 16;
  Floats sums[kRows];
  UNROLLED for (int r = 0; r < kRows; ++r) sums[r] = splat(0);
  const uint32_t* x = rows.x;
  for (int64_t k = 0; k < weights.inputs; k += kSquare) {
    UNROLLED for (int first = 0; first < 16; first += kAtOnce, x += kAtOnce * kRows) {
      __m512i pairs[kAtOnce];
      if constexpr (kWhole) {
        weights.from(0, k).half_square(first, pairs);
      } else {
        weights.from(0, k).square(pairs);
      }
      UNROLLED for (int i = 0; i < kAtOnce; ++i) {
        UNROLLED for (int r = 0; r < kRows; ++r) sums[r] = add_products(sums[r], pairs[i], x[i * kRows + r]);
      }
    }
  }
  UNROLLED for (int r = 0; r < kRows; ++r) rows.put(r, 0, weights.outputs, sums[r]);
}

template <int kRows = kFewRows>
void multiply_few(const Weights& weights, const Rows& rows) {
  if constexpr (kRows > 1) {
    if (rows.count < kRows) return multiply_few<kRows - 1>(weights, rows);
  }
  if (!weights.transposed && weights.outputs >= kWidth && weights.inputs % kSquare == 0) {
    return multiply<kRows, true>(weights, rows);
  }
  multiply<kRows, false>(weights, rows);
}

// ---- more rows ------------------------------------------------------------------------------------------------------

struct Panel {
  static constexpr int64_t kOutputs = kVectors * kWidth;

  alignas(64) uint32_t pairs[kVectors][kLongBlock / 2 * kWidth];
  int64_t outputs, count;

  void fill(const Weights& weights) {
    outputs = least(kOutputs, weights.outputs);
    count = quotient_up(weights.inputs, 2);
    for (int64_t n = 0; n < outputs; n += kWidth) {
      uint32_t* to = pairs[n / kWidth];
      for (int64_t k = 0; k < weights.inputs; k += kSquare) {
        __m512i square[16];
        weights.from(n, k).square(square);
        UNROLLED for (int i = 0; i < 16; ++i, to += kWidth) _mm512_store_si512(to, square[i]);
      }
    }
  }
};

// Memory to ask for, `lines` of 64 bytes from time to time.
struct Ahead {
  const char *next, *end;
  int64_t lines;

  void fetch() {
    for (int64_t i = 0; i < lines && next < end; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

template <int kRows, int kVectors>
WITH_PAIRS __attribute__((noinline)) void multiply(const Panel& panel, const Rows& rows, Ahead& ahead) {
  Floats sums[kRows][kVectors];
  UNROLLED for (int r = 0; r < kRows; ++r) {
    UNROLLED for (int v = 0; v < kVectors; ++v) sums[r][v] = splat(0);
  }
  const uint32_t* x = rows.x;
  for (int64_t begin = 0; begin < panel.count; begin += kBetweenFetches) {
    ahead.fetch();
    for (int64_t i = begin; i < least(begin + kBetweenFetches, panel.count); ++i, x += kRows) {
      __m512i pairs[kVectors];
      UNROLLED for (int v = 0; v < kVectors; ++v) pairs[v] = _mm512_load_si512(&panel.pairs[v][i * kWidth]);
      UNROLLED for (int r = 0; r < kRows; ++r) {
        UNROLLED for (int v = 0; v < kVectors; ++v) sums[r][v] = add_products(sums[r][v], pairs[v], x[r]);
      }
    }
  }
  UNROLLED for (int r = 0; r < kRows; ++r) {
    UNROLLED for (int v = 0; v < kVectors; ++v) rows.put(r, v, panel.outputs - v * kWidth, sums[r][v]);
  }
}

template <int kRows = kMostRows>
void multiply_more(const Panel& panel, const Rows& rows, Ahead& ahead) {
  if constexpr (2 * kRows > kMostRows + 1) {  // shared out evenly, groups of more than 8 rows are no smaller
    if (rows.count < kRows) return multiply_more<kRows - 1>(panel, rows, ahead);
  }
  if (panel.outputs > kWidth) return multiply<kRows, kVectors>(panel, rows, ahead);
  multiply<kRows, 1>(panel, rows, ahead);
}

}  // namespace

Groups::Groups(int64_t rows) : rows(rows), count(quotient_up(rows, kMostRows)) {}

WITH_PAIRS void to_pairs(const float* x, int64_t rows, int64_t x_stride, int64_t size, uint32_t* pairs) {
  for (int64_t k = 0; k < size; k += kSquare) {
    __m512i square[16];
    UNROLLED for (int i = 0; i < 16; ++i) {
      const float* const from = x + (i < rows ? i : 0) * x_stride + k;
      const int64_t there = i < rows ? size - k : 0;
      const Floats low = _mm512_maskz_loadu_ps(first_lanes(there), from);
      const Floats high = _mm512_maskz_loadu_ps(first_lanes(there - kWidth), from + kWidth);
      square[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }
    if (rows == 1) {
      _mm512_storeu_si512(pairs, square[0]);
      pairs += 16;
      continue;
    }
    transpose(square);
    UNROLLED for (int i = 0; i < 16; ++i, pairs += rows) {
      _mm512_mask_storeu_epi32(pairs, first_lanes(rows), square[i]);
    }
  }
}

void paired_outputs(const Linear& layer, const uint32_t* x, int64_t rows, float* y, int64_t y_stride, int64_t begin,
                    int64_t end) {
  const Groups groups(rows);
  const bool few = rows <= kFewRows;
  const int64_t at_once = few ? kWidth : Panel::kOutputs, block = inputs_of_block(layer.in);
  const int64_t most_groups = most(kFewestGroups, kRowsBytes / (kMostRows * paired_row(layer.in) * 4));
  int64_t ahead = layer.transposed ? at_once : 0;
  if (few) ahead = (layer.transposed ? kSquare : at_once) * layer.row_stride;
  const Weights all{static_cast<const bfloat16*>(layer.weight), layer.row_stride, end, layer.in, layer.transposed,
                    ahead};
  const auto* const bias = static_cast<const bfloat16*>(layer.bias);
  Panel panel;

  for (int64_t first = 0; first < groups.count; first += most_groups) {
    const int64_t last = least(groups.count, first + most_groups);
    for (int64_t n = begin; n < end; n += at_once) {
      bfloat16 some[Panel::kOutputs] = {};
      if (bias) memcpy(some, bias + n, least(at_once, end - n) * sizeof *bias);
      Floats biases[kVectors];
      for (int v = 0; v < kVectors; ++v) biases[v] = load(some + v * kWidth);

      for (int64_t k = 0; k < layer.in; k += block) {
        Weights weights = all.from(n, k);
        weights.inputs = least(block, weights.inputs);
        const auto group = [&](int64_t g) {
          const int64_t row = groups.first(g), count = groups.first(g + 1) - row;
          return Rows{x + row * paired_row(layer.in) + k / 2 * count, count, y + row * y_stride + n, y_stride, k == 0,
                      bias && k + block >= layer.in ? biases : nullptr};
        };
        if (few) {
          multiply_few(weights, group(0));
          continue;
        }
        panel.fill(weights);
        Ahead next{};
        if (!layer.transposed && n + at_once < end) {  // its share of the next outputs' rows, which lie in one piece
          const char* const outputs = reinterpret_cast<const char*>(all.from(n + at_once, 0).weight);
          next = {outputs + at_once * k * 2, outputs + at_once * (k + weights.inputs) * 2, 0};
          next.lines = quotient_up((next.end - next.next) / 64,
                                   (last - first) * quotient_up(panel.count, kBetweenFetches));
        }
        for (int64_t g = first; g < last; ++g) multiply_more(panel, group(g), next);
      }
    }
  }
}

}  // namespace rlhf_fast::RLHF_FAST_ISA

#endif
