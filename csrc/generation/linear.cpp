// With weights [out, in] an output is a sum in one vector of accumulators: lane j adds the products of k = j,
// j + kWidth, ... in that order, and sum4 adds the lanes. With transposed weights [in, out] the lanes are outputs, and
// each adds its products in the order of k. No block, no shape of a micro-kernel and no thread changes that order: sums
// that go on later are kept as they are, one for each accumulator.
//
// bfloat16 weights come here where the CPU cannot multiply pairs of bfloat16; else see linear_bfloat16.h.
//
// What makes it fast: a micro-kernel computes kPanel x kMostRows vectors of sums, all in registers; the weights come
// from memory once, asked for while the block before is computed; 16-bit weights are made floats once for many rows.
#include "linear.h"

#include <omp.h>

#include "../cpu/simd.h"
#include "linear_bfloat16.h"

// The loops over registers: arrays whose index is not known when compiling lie in memory.
#define UNROLLED _Pragma("GCC unroll 8")

namespace rlhf_fast::RLHF_FAST_ISA {
namespace {

constexpr int kPanel = 4;
#if defined(RLHF_FAST_AVX512)
constexpr int kMostRows = 6;  // 24 of 32 registers are sums
#else
constexpr int kMostRows = 3;  // 12 of 16
#endif

// Sizes for a first-level cache of 32 KiB and a second of 512 KiB or more.
constexpr int64_t kBlockInputs = 1024;           // of k at a time
constexpr int64_t kBlockBytes = 16 << 10;        // of weights as floats, used for all rows of x before the next
constexpr int64_t kBlockOutputs = 16 * kPanel;
constexpr int64_t kChunkBytes = 128 << 10;       // of weights as floats, used for each block of rows of x
constexpr int64_t kRowsBytes = 192 << 10;        // of x
constexpr int64_t kBlockRows = 96;
constexpr int64_t kLongRow = 4096;               // bytes; the CPU by itself fetches such rows ahead
constexpr int64_t kWorthCopy = 4 * kMostRows;    // rows for which a copy of a block of weights, as floats, pays
constexpr int64_t kWorthThreads = 1 << 15;       // products that are worth the start of the threads

// The same for transposed weights, whose rows are read across: a few short pieces at a time, or copied together.
constexpr int64_t kPanelLanes = kPanel * kWidth;
constexpr int64_t kDirectInputs = 8;
constexpr int64_t kDirectOutputs = 1024;
constexpr int64_t kCopiedInputs = 64;
constexpr int64_t kCopiedOutputs = 8 * kPanelLanes;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
struct Weights {
  const T* weight;
  int64_t out, in, row_stride;
  const T* bias;
};

struct Rows {
  const float* x;
  int64_t x_stride;
  float* y;
  int64_t y_stride;
  int64_t count;

  Rows some(int64_t first, int64_t number) const {
    return {x + first * x_stride, x_stride, y + first * y_stride, y_stride, number};
  }
  Rows from(int64_t k, int64_t n) const { return {x + k, x_stride, y + n, y_stride, count}; }
};

// p[0..count), count < kWidth, and zeros after it.
template <typename T>
Floats load_part(const T* p, int64_t count) {
  T part[kWidth] = {};
  memcpy(part, p, count * sizeof(T));
  return load(part);
}

inline void store_part(float* p, Floats v, int64_t count) {
  float part[kWidth];
  store(part, v);
  memcpy(p, part, count * sizeof(float));
}

// to[0..n) = from[0..n), then zeros up to a multiple of kWidth.
template <typename T>
void to_floats(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(to + i, load(from + i));
  if (i < n) store(to + i, load_part(from + i, n - i));
}

// Calls kernel<n>(rows of n) for all rows, with equal n as far as possible.
template <int kRows, typename Kernel>
void call_for(const Rows& rows, Kernel& kernel) {
  if (rows.count == kRows) return kernel.template operator()<kRows>(rows);
  if constexpr (kRows > 1) call_for<kRows - 1>(rows, kernel);
}
template <typename Kernel>
void for_each_group(const Rows& rows, Kernel kernel) {
  const int64_t groups = quotient_up(rows.count, kMostRows);
  for (int64_t g = 0, row = 0; g < groups; ++g) {
    const int64_t number = (rows.count - row) / (groups - g);
    call_for<kMostRows>(rows.some(row, number), kernel);
    row += number;
  }
}

// ---- weights [out, in] ----------------------------------------------------------------------------------------------

// Some outputs and some of k.
template <typename T>
struct Block {
  const T* weight;
  int64_t row_stride;
  int64_t outputs, inputs;
  const float* bias;  // with zeros after it up to a multiple of kPanel
  bool first, last;   // of the blocks of k: whether sums begin, and end
};

// Memory to ask for meanwhile: `step` bytes further with each vector of k.
struct Ahead {
  const char* next;
  int64_t step;
};

template <int kRows, typename T>
__attribute__((noinline)) void multiply(const Block<T> block, const Rows rows, Floats* state, Ahead& ahead) {
  constexpr int kLines = kPanel * kWidth * sizeof(T) > 64 ? kPanel * kWidth * sizeof(T) / 64 : 1;
  const char* next = ahead.next;
  for (int64_t n = 0; n < block.outputs; n += kPanel, state += kRows * kPanel) {
    const int64_t count = block.outputs - n;
    const T* weight[kPanel];  // a last, narrower panel computes its first output several times
    UNROLLED for (int i = 0; i < kPanel; ++i) {
      weight[i] = block.weight + (n + (i < count ? i : 0)) * block.row_stride;
    }
    Floats sums[kRows][kPanel];
    UNROLLED for (int r = 0; r < kRows; ++r) {
      UNROLLED for (int i = 0; i < kPanel; ++i) sums[r][i] = block.first ? splat(0) : state[r * kPanel + i];
    }

    int64_t k = 0;
#pragma GCC unroll 2
    for (; k + kWidth <= block.inputs; k += kWidth, next += ahead.step) {
      UNROLLED for (int line = 0; line < kLines; ++line) __builtin_prefetch(next + 64 * line, 0, 2);
      Floats x[kRows];
      UNROLLED for (int r = 0; r < kRows; ++r) x[r] = load(rows.x + r * rows.x_stride + k);
      UNROLLED for (int i = 0; i < kPanel; ++i) {
        const Floats w = load(weight[i] + k);
        UNROLLED for (int r = 0; r < kRows; ++r) sums[r][i] = fma(w, x[r], sums[r][i]);
      }
    }
    if (k < block.inputs) {
      const int64_t left = block.inputs - k;
      Floats x[kRows];
      UNROLLED for (int r = 0; r < kRows; ++r) x[r] = load_part(rows.x + r * rows.x_stride + k, left);
      UNROLLED for (int i = 0; i < kPanel; ++i) {
        const Floats w = load_part(weight[i] + k, left);
        UNROLLED for (int r = 0; r < kRows; ++r) sums[r][i] = fma(w, x[r], sums[r][i]);
      }
    }

    if (!block.last) {
      UNROLLED for (int r = 0; r < kRows; ++r) {
        UNROLLED for (int i = 0; i < kPanel; ++i) state[r * kPanel + i] = sums[r][i];
      }
      continue;
    }
    FourFloats bias;
    memcpy(&bias, block.bias + n, sizeof bias);
    UNROLLED for (int r = 0; r < kRows; ++r) {
      const FourFloats y = bias + sum4(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
      float* const to = rows.y + r * rows.y_stride + n;
      if (count >= kPanel) {
        memcpy(to, &y, sizeof y);
      } else {
        memcpy(to, &y, count * sizeof(float));
      }
    }
  }
  ahead.next = next;
}

// All rows, while the `bytes` at `next` are fetched.
template <typename T>
void multiply_all(const Block<T>& block, const Rows& rows, Floats* state, const void* next, int64_t bytes) {
  const int64_t steps = quotient_up(rows.count, kMostRows) * quotient_up(block.outputs, kPanel) * block.inputs;
  Ahead ahead{static_cast<const char*>(next), bytes * kWidth / steps};
  for_each_group(rows, [&]<int kRows>(const Rows& group) {
    multiply<kRows>(block, group, state, ahead);
    state += kRows * quotient_up(block.outputs, kPanel) * kPanel;
  });
}

// Outputs [begin, end) of all rows.
template <typename T>
void outputs(const Weights<T>& w, const Rows& all, int64_t begin, int64_t end) {
  const int64_t k_block = quotient_up(quotient_up(w.in, quotient_up(w.in, kBlockInputs)), kWidth) * kWidth;
  const int64_t panel_bytes = kPanel * k_block * sizeof(float);
  const bool whole = k_block >= w.in;
  const int64_t n_block = whole ? most(1, least(kBlockOutputs / kPanel, kBlockBytes / panel_bytes)) * kPanel : kPanel;
  const int64_t n_chunk = most(1, kChunkBytes / (n_block * w.in * int64_t(sizeof(float)))) * n_block;
  const int64_t most_rows = least(kBlockRows, most(4 * kMostRows, kRowsBytes / (w.in * int64_t(sizeof(float)))));
  const int64_t row_blocks = quotient_up(all.count, most_rows);
  const bool convert = sizeof(T) < sizeof(float) && all.count > kWorthCopy;
  const bool fetch = all.count > kMostRows || w.in * int64_t(sizeof(T)) <= kLongRow;

  alignas(64) float floats[kBlockBytes / sizeof(float)];
  alignas(64) Floats state[kBlockRows * kPanel];
  float bias[kBlockOutputs] = {};

  for (int64_t chunk = begin; chunk < end; chunk += n_chunk) {
    for (int64_t b = 0; b < row_blocks; ++b) {
      const int64_t row = all.count * b / row_blocks;
      const Rows rows = all.some(row, all.count * (b + 1) / row_blocks - row);
      for (int64_t n = chunk; n < least(end, chunk + n_chunk); n += n_block) {
        const int64_t number = least(n_block, end - n);
        if (w.bias) to_floats(w.bias + n, number, bias);
        for (int64_t k = 0; k < w.in; k += k_block) {
          const int64_t inputs = least(k_block, w.in - k);
          const bool first = k == 0, last = k + inputs == w.in;
          const T* const weight = w.weight + n * w.row_stride + k;
          const T* const next = fetch ? w.weight + (n + n_block) * w.row_stride + k * n_block : weight;
          const int64_t bytes = fetch ? n_block * inputs * sizeof(T) : 0;
          if (convert) {
            for (int64_t i = 0; i < number; ++i) to_floats(weight + i * w.row_stride, inputs, floats + i * k_block);
            multiply_all<float>({floats, k_block, number, inputs, bias, first, last}, rows.from(k, n), state, next,
                                bytes);
          } else {
            multiply_all<T>({weight, w.row_stride, number, inputs, bias, first, last}, rows.from(k, n), state, next,
                            bytes);
          }
        }
      }
    }
  }
}

// ---- weights [in, out] ----------------------------------------------------------------------------------------------

// Up to kPanelLanes outputs; sums go on in y.
template <int kRows, typename T>
void multiply_transposed(const Block<T>& block, const Rows& rows) {
  const auto part = [&](int i) { return block.outputs - i * kWidth; };
  Floats sums[kRows][kPanel];
  UNROLLED for (int r = 0; r < kRows; ++r) {
    UNROLLED for (int i = 0; i < kPanel; ++i) {
      const float* const from = block.first ? block.bias + i * kWidth : rows.y + r * rows.y_stride + i * kWidth;
      sums[r][i] = part(i) >= kWidth ? load(from) : part(i) > 0 ? load_part(from, part(i)) : splat(0);
    }
  }
  const T* weight = block.weight;
  for (int64_t k = 0; k < block.inputs; ++k, weight += block.row_stride) {
    Floats x[kRows];
    UNROLLED for (int r = 0; r < kRows; ++r) x[r] = splat(rows.x[r * rows.x_stride + k]);
    UNROLLED for (int i = 0; i < kPanel; ++i) {
      const Floats w = load(weight + i * kWidth);
      UNROLLED for (int r = 0; r < kRows; ++r) sums[r][i] = fma(w, x[r], sums[r][i]);
    }
  }
  UNROLLED for (int r = 0; r < kRows; ++r) {
    UNROLLED for (int i = 0; i < kPanel; ++i) {
      float* const to = rows.y + r * rows.y_stride + i * kWidth;
      if (part(i) >= kWidth) {
        store(to, sums[r][i]);
      } else if (part(i) > 0) {
        store_part(to, sums[r][i], part(i));
      }
    }
  }
}

// Asks for a share of the rows of the next block, a panel wide.
template <typename T>
void fetch_transposed(const Weights<T>& w, int64_t k, int64_t n, int64_t share, int64_t shares) {
  for (int64_t i = kCopiedInputs * share / shares; i < kCopiedInputs * (share + 1) / shares; ++i) {
    const char* const row = reinterpret_cast<const char*>(w.weight + (k + i) * w.row_stride + n);
    for (int64_t byte = 0; byte < kPanelLanes * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
}

// Outputs [begin, end) of all rows. For many rows, and at the right edge, weights are copied together as floats.
template <typename T>
void transposed_outputs(const Weights<T>& w, const Rows& rows, int64_t begin, int64_t end) {
  const bool copy = rows.count > kWorthCopy;
  const int64_t n_block = copy ? kCopiedOutputs : kDirectOutputs, k_block = copy ? kCopiedInputs : kDirectInputs;
  const int64_t groups = quotient_up(rows.count, kMostRows);
  alignas(64) float floats[kCopiedInputs * kCopiedOutputs];
  float bias[most(kDirectOutputs, kCopiedOutputs)] = {};

  for (int64_t n = begin; n < end; n += n_block) {
    const int64_t number = least(n_block, end - n);
    if (w.bias) to_floats(w.bias + n, number, bias);
    for (int64_t k = 0; k < w.in; k += k_block) {
      const int64_t inputs = least(k_block, w.in - k);
      const auto is_copied = [&](int64_t panel) { return copy || number - panel < kPanelLanes; };
      const auto floats_of = [&](int64_t panel) { return floats + (copy ? panel * kCopiedInputs : 0); };
      for (int64_t i = 0; i < inputs; ++i) {
        const T* const from = w.weight + (k + i) * w.row_stride + n;
        for (int64_t panel = copy ? 0 : number / kPanelLanes * kPanelLanes; panel < number; panel += kPanelLanes) {
          to_floats(from + panel, least(kPanelLanes, number - panel), floats_of(panel) + i * kPanelLanes);
        }
      }
      int64_t share = 0;
      for_each_group(rows, [&]<int kRows>(const Rows& group) {
        for (int64_t panel = 0; panel < number; panel += kPanelLanes) {
          const int64_t outputs = least(kPanelLanes, number - panel);
          const Rows at = group.from(k, n + panel);
          if (copy && k + k_block < w.in) fetch_transposed(w, k + k_block, n + panel, share, groups);
          if (is_copied(panel)) {
            multiply_transposed<kRows, float>({floats_of(panel), kPanelLanes, outputs, inputs, bias + panel, k == 0},
                                              at);
          } else {
            multiply_transposed<kRows, T>(
                {w.weight + k * w.row_stride + n + panel, w.row_stride, outputs, inputs, bias + panel, k == 0}, at);
          }
        }
        ++share;
      });
    }
  }
}

// ---- both -----------------------------------------------------------------------------------------------------------

// Outputs [begin, end) of the layer.
template <typename T>
void some_outputs(const Linear& layer, const Rows& rows, int64_t begin, int64_t end) {
  const Weights<T> w{static_cast<const T*>(layer.weight), layer.out, layer.in, layer.row_stride,
                     static_cast<const T*>(layer.bias)};
  layer.transposed ? transposed_outputs(w, rows, begin, end) : outputs(w, rows, begin, end);
}

// One thread's part of the outputs of each layer.
void share(const Linear* layers, int64_t count, Rows rows, const uint32_t* pairs, int64_t thread, int64_t threads) {
  for (int64_t i = 0; i < count; ++i) {
    const Linear& layer = layers[i];
    const int64_t vectors = quotient_up(layer.out, kWidth);
    const int64_t begin = vectors * thread / threads * kWidth;
    const int64_t end = least(layer.out, vectors * (thread + 1) / threads * kWidth);
    switch (layer.type) {
      case WeightType::float32: some_outputs<float>(layer, rows, begin, end); break;
      case WeightType::bfloat16:
#if defined(RLHF_FAST_AVX512)
        if (pairs) {
          paired_outputs(layer, pairs, rows.count, rows.y, rows.y_stride, begin, end);
          break;
        }
#endif
        some_outputs<bfloat16>(layer, rows, begin, end);
        break;
      case WeightType::float16: some_outputs<float16>(layer, rows, begin, end); break;
    }
    rows = rows.from(0, layer.out);
  }
}

}  // namespace

void linear(const Linear* layers, int64_t count, const float* x, int64_t rows, int64_t x_stride, float* y,
            int64_t y_stride, uint32_t* pairs) {
  const Rows all{x, x_stride, y, y_stride, rows};
  int64_t products = 0;
  for (int64_t i = 0; i < count; ++i) products += layers[i].out * layers[i].in * rows;
  const auto part = [&] {
    uint32_t* read = pairs;
#if defined(RLHF_FAST_AVX512)
    if (pairs && rows <= kRowsOfGroup) {
      read += omp_get_thread_num() * rows * paired_row(layers[0].in);
      to_pairs(x, rows, x_stride, layers[0].in, read);
    } else if (pairs) {
      const Groups groups(rows);
#pragma omp for schedule(static)
      for (int64_t g = 0; g < groups.count; ++g) {
        const int64_t first = groups.first(g), number = groups.first(g + 1) - first;
        to_pairs(x + first * x_stride, number, x_stride, layers[0].in, pairs + first * paired_row(layers[0].in));
      }
    }
#endif
    share(layers, count, all, read, omp_get_thread_num(), omp_get_num_threads());
  };
  if (products < kWorthThreads) return part();
#pragma omp parallel
  part();
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
